"""How much memory the keys and values of sampled rows take."""

from __future__ import annotations

from typing import Any


def cache_bytes(model: Any, length: int) -> int:
    """Bytes that the cache holds of one row of `length` tokens: kv heads * (key width + value width) * itemsize in each
    layer, by the model's config.

    Layers that look back over a window hold at most the window; those that keep no keys hold nothing of any length.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers or [DynamicLayer()] * config.num_hidden_layers
    per_layer = list(getattr(config, "per_layer_config", None) or [config] * len(layers))
    held = sum(
        min(length, getattr(layer, "sliding_window", None) or length) * key_value_width(of_layer)
        for layer, of_layer in zip(layers, per_layer, strict=False)
        if isinstance(layer, DynamicLayer)
    )
    return int(held * model.dtype.itemsize)


def key_value_width(config: Any) -> int:
    """Numbers that a layer keeps of one token: keys and values of all its key-value heads."""
    heads = getattr(config, "num_attention_heads", None) or 1
    if getattr(config, "qk_nope_head_dim", None):  # multi-head latent attention: keys and values are held expanded
        return int(heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim))
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * kv_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))
