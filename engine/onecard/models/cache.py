"""The size of the KV cache."""

from __future__ import annotations

from typing import Any


def cache_bytes(model: Any, length: int) -> int:
    """Bytes of the KV cache for one row of `length` tokens.

    Each layer takes length * kv heads * (key width + value width) * itemsize, by the model's config. A sliding-window
    layer caches at most its window. Layers without keys and values count as 0.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers or [DynamicLayer()] * config.num_hidden_layers
    per_layer = list(getattr(config, "per_layer_config", None) or [config] * len(layers))
    elements = sum(
        min(length, getattr(layer, "sliding_window", None) or length) * key_value_width(layer_config)
        for layer, layer_config in zip(layers, per_layer, strict=False)
        if isinstance(layer, DynamicLayer)
    )
    return int(elements * model.dtype.itemsize)


def key_value_width(config: Any) -> int:
    """Elements that a layer caches for one token: keys and values of all its key-value heads."""
    heads = getattr(config, "num_attention_heads", None) or 1
    if getattr(config, "qk_nope_head_dim", None):  # multi-head latent attention: the cache has expanded keys and values
        return int(heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim))
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * kv_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))
