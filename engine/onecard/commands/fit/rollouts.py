"""A rollout on `meta`: the pass over the prompts, and those at which its cache is largest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.rollout import DecodeBatch, Sampling, UncachedBatch, sample_token

Making = Callable[[], AbstractContextManager[None]]  # what is made inside is the cache's


def sample_longest(
    batch: DecodeBatch, prompt: int, total: int, waiting: int, sampling: Sampling, making: Making
) -> None:
    """Every row from a prompt of so many tokens to the last one that can be drawn, `total` with the prompt.

    `waiting`: prompts that come in where others have ended.
    """
    if isinstance(batch, UncachedBatch):  # a row is run whole for each token, and the last time it is longest
        sample_token(batch.prefill([(0,) * (total - 1)], [0], [0]), sampling, [])
        return
    batch.on_new_cache = partial(follow, making)
    rows = list(range(batch.size))
    tokens, _ = sample_token(batch.prefill([(0,) * prompt] * batch.size, rows, rows), sampling, [])
    batch.append(tokens)
    for stretch in (stretch_slots if batch.continuous else stretch_padded)(batch, total - 1):
        stretch(making)
        sample_token(batch.logits(), sampling, [])
    if waiting and batch.continuous:  # beside a cache that is as large as it gets
        batch.row_prompts[1:] = [None] * (batch.size - 1)
        if rows := batch.free_rows(waiting):
            sample_token(batch.prefill([(0,) * prompt] * len(rows), rows, rows), sampling, [])
    del batch.cache.update  # it knows itself by it, and would not be let go of


def follow(making: Making, cache: Any) -> None:
    """What comes into the cache is the cache's."""
    update = cache.update

    def followed(*given: Any, **more: Any) -> Any:
        with making():
            return update(*given, **more)

    cache.update = followed


def hold(layer: Any, columns: int, making: Making) -> None:
    """Keys and values of so many tokens, in place of those that are there."""
    shape, dtype = list(layer.keys.shape), layer.keys.dtype
    shape[-2] = columns
    layer.keys = layer.values = None
    with making():
        layer.keys, layer.values = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))


def stretch_padded(batch: Any, columns: int) -> list[Callable[[Making], None]]:
    """The cache, mask and positions as they are when the last token is due."""

    def last(making: Making) -> None:
        for layer in batch.cache.layers:
            if not isinstance(getattr(layer, "keys", None), Tensor):
                continue
            window = getattr(layer, "sliding_window", None)
            hold(layer, columns - 1 if window is None else min(columns - 1, window - 1), making)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = columns - 1
        batch.mask = batch.mask.new_ones(len(batch.prompt_indices), columns)
        batch.positions = batch.positions[:, -1:] + 1

    return [last]


def stretch_slots(batch: Any, columns: int) -> list[Callable[[Making], None]]:
    """The memory grows for the last time, and then its last column is read."""
    from onecard.rollout.cache_slots import GROWTH

    def grows(making: Making) -> None:
        batch.layout.capacity = (columns - 1) // GROWTH * GROWTH
        for layer in batch.cache.layers:
            hold(layer, batch.layout.capacity, making)
        batch.host_lengths = [batch.layout.capacity] * batch.size
        with making():
            batch.grow(batch.layout.capacity + 1)

    def last(making: Making) -> None:
        batch.host_lengths = [columns - 1] * batch.size

    return [last] if batch.layout.capacity == columns else [grows, last]
