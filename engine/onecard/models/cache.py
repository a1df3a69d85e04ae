"""How much memory the keys and values of sampled rows take."""

from __future__ import annotations

from typing import Any


def cache_bytes(model: Any, length: int) -> int:
    """Bytes that the cache holds of one row of `length` tokens: 2 * kv heads * head_dim * itemsize in each layer.

    Layers that look back over a window hold at most the window; those that keep no keys hold nothing of any length.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = DynamicCache(config=model.config).layers or [DynamicLayer()] * config.num_hidden_layers
    windows = [getattr(layer, "sliding_window", None) or length for layer in layers if isinstance(layer, DynamicLayer)]
    tokens = sum(min(length, window) for window in windows)
    return int(2 * kv_heads * head_dim * model.dtype.itemsize * tokens)
