"""A rollout on `meta`: the prefill, and the decoding steps at which the KV cache is largest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.rollout import CachedBatch, DecodeBatch, Sampling, sample_token

CacheMemory = Callable[[], AbstractContextManager[None]]  # tensors that are created inside count as KV cache


def sample_longest(
    batch: DecodeBatch, prompt: int, total: int, waiting: int, sampling: Sampling, cache_memory: CacheMemory
) -> None:
    """Run prefill and the largest decoding steps of a batch whose sequences all reach `total` tokens.

    `prompt`: tokens of each prompt; `total`: tokens of prompt and response; `waiting`: number of prompts that take the
    slots of finished sequences.
    """
    if not isinstance(batch, CachedBatch):  # every step runs the whole sequence, so the last step is the largest
        sample_token(batch.prefill([(0,) * (total - 1)], [0], [0]), sampling, [])
        return
    batch.on_new_cache = partial(tag_cache_updates, cache_memory)
    rows = list(range(batch.size))
    tokens, _ = sample_token(batch.prefill([(0,) * prompt] * batch.size, rows, rows), sampling, [])
    batch.append(tokens)
    for resize in (slot_cache_sizes if batch.continuous else padded_cache_sizes)(batch, total - 1):
        resize(cache_memory)
        sample_token(batch.logits(), sampling, [])
    if waiting and batch.continuous:  # prefill of waiting prompts while the cache has its largest size
        batch.row_prompts[1:] = [None] * (batch.size - 1)
        if rows := batch.free_rows(waiting):
            sample_token(batch.prefill([(0,) * prompt] * len(rows), rows, rows), sampling, [])
    del batch.cache.update  # the wrapper makes a reference cycle, which would keep the cache alive


def tag_cache_updates(cache_memory: CacheMemory, cache: Any) -> None:
    """Wrap the cache's `update`, so that tensors which it creates count as KV cache."""
    update = cache.update

    def tagged_update(*args: Any, **kwargs: Any) -> Any:
        with cache_memory():
            return update(*args, **kwargs)

    cache.update = tagged_update


def set_cache_length(layer: Any, columns: int, cache_memory: CacheMemory) -> None:
    """Replace a layer's keys and values by empty ones of `columns` tokens."""
    shape, dtype = list(layer.keys.shape), layer.keys.dtype
    shape[-2] = columns
    layer.keys = layer.values = None
    with cache_memory():
        layer.keys, layer.values = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))


def padded_cache_sizes(batch: Any, columns: int) -> list[Callable[[CacheMemory], None]]:
    """A function that gives cache, mask and positions their sizes at the last decoding step."""

    def last(cache_memory: CacheMemory) -> None:
        for layer in batch.cache.layers:
            if not isinstance(getattr(layer, "keys", None), Tensor):
                continue
            window = getattr(layer, "sliding_window", None)
            set_cache_length(layer, columns - 1 if window is None else min(columns - 1, window - 1), cache_memory)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = columns - 1
        batch.mask = batch.mask.new_ones(len(batch.prompt_indices), columns)
        batch.positions = batch.positions[:, -1:] + 1

    return [last]


def slot_cache_sizes(batch: Any, columns: int) -> list[Callable[[CacheMemory], None]]:
    """Functions that give the cache slots their sizes at their last growth and at the last decoding step."""
    from onecard.rollout.cache_slots import GROWTH

    def last_growth(cache_memory: CacheMemory) -> None:
        batch.layout.capacity = (columns - 1) // GROWTH * GROWTH
        for layer in batch.cache.layers:
            set_cache_length(layer, batch.layout.capacity, cache_memory)
        batch.host_lengths = [batch.layout.capacity] * batch.size
        with cache_memory():
            batch.grow(batch.layout.capacity + 1)

    def last(cache_memory: CacheMemory) -> None:
        batch.host_lengths = [columns - 1] * batch.size

    return [last] if batch.layout.capacity == columns else [last_growth, last]
