"""Runs a rollout on `meta`: only the prefill, and the decoding steps that need the most memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.rollout import CachedBatch, DecodeBatch, Sampling, sample_token

CacheMemory = Callable[[], AbstractContextManager[None]]  # in this context, new tensors count as KV cache


def run_largest_steps(
    batch: DecodeBatch, prompt_length: int, length: int, waiting: int, sampling: Sampling, cache_memory: CacheMemory
) -> None:
    """Run prefill and the largest decoding steps of a batch whose sequences all reach `length` tokens.

    `prompt_length`: tokens of each prompt; `length`: of prompt and response; `waiting`: number of prompts that take the
    cache slots of finished sequences.
    """
    if not isinstance(batch, CachedBatch):  # every step runs the whole sequence, so the last one is the largest
        sample_token(batch.prefill([(0,) * (length - 1)], [0], [0]), sampling, [])
        return
    batch.on_new_cache = partial(tag_cache_updates, cache_memory)
    rows = list(range(batch.size))
    tokens, _ = sample_token(batch.prefill([(0,) * prompt_length] * batch.size, rows, rows), sampling, [])
    batch.append(tokens)
    for resize in (slot_cache_sizes if batch.continuous else padded_cache_sizes)(batch, length - 1):
        resize(cache_memory)
        sample_token(batch.logits(), sampling, [])
    if waiting and batch.continuous:  # waiting prompts are prefilled while the cache has its largest size
        batch.row_prompts[1:] = [None] * (batch.size - 1)
        if rows := batch.free_rows(waiting):
            sample_token(batch.prefill([(0,) * prompt_length] * len(rows), rows, rows), sampling, [])
    del batch.cache.update  # the wrapper and the cache refer to each other, which would keep the cache alive


def tag_cache_updates(cache_memory: CacheMemory, cache: Any) -> None:
    """Wrap the cache's `update`, so that tensors that it creates count as KV cache."""
    update = cache.update

    def tagged_update(*args: Any, **kwargs: Any) -> Any:
        with cache_memory():
            return update(*args, **kwargs)

    cache.update = tagged_update


def set_cache_length(layer: Any, length: int, cache_memory: CacheMemory) -> None:
    """Replace a layer's keys and values by empty tensors for `length` tokens."""
    shape, dtype = list(layer.keys.shape), layer.keys.dtype
    shape[-2] = length
    layer.keys = layer.values = None
    with cache_memory():
        layer.keys, layer.values = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))


def padded_cache_sizes(batch: Any, columns: int) -> list[Callable[[CacheMemory], None]]:
    """The function that resizes a padded batch to its last decoding step, with `columns` tokens in a row."""

    def resize_to_last_step(cache_memory: CacheMemory) -> None:
        for layer in batch.cache.layers:
            if not isinstance(getattr(layer, "keys", None), Tensor):
                continue
            window = getattr(layer, "sliding_window", None)
            set_cache_length(layer, columns - 1 if window is None else min(columns - 1, window - 1), cache_memory)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = columns - 1
        batch.mask = batch.mask.new_ones(len(batch.prompt_indices), columns)
        batch.positions = batch.positions[:, -1:] + 1

    return [resize_to_last_step]


def slot_cache_sizes(batch: Any, columns: int) -> list[Callable[[CacheMemory], None]]:
    """Functions that resize the cache slots to their last growth and to the last decoding step, of `columns` tokens."""
    from onecard.rollout.cache_slots import GROWTH  # imports transformers

    def resize_to_last_growth(cache_memory: CacheMemory) -> None:
        batch.layout.capacity = (columns - 1) // GROWTH * GROWTH
        for layer in batch.cache.layers:
            set_cache_length(layer, batch.layout.capacity, cache_memory)
        batch.host_lengths = [batch.layout.capacity] * batch.size
        with cache_memory():
            batch.grow(batch.layout.capacity + 1)

    def resize_to_last_step(cache_memory: CacheMemory) -> None:
        batch.host_lengths = [columns - 1] * batch.size

    only_last = batch.layout.capacity == columns
    return [resize_to_last_step] if only_last else [resize_to_last_growth, resize_to_last_step]
