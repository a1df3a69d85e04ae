"""A rollout on `meta`: the pass over the prompts, and those at which its cache is largest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.rollout import Held, Sampling, draw

Name = Callable[[list[Tensor]], None]  # is told the tensors of the cache


def sample_longest(held: Held, prompt: int, total: int, sampling: Sampling, name: Name) -> None:
    """Every row from a prompt of so many tokens to the last one that can be drawn, `total` with the prompt."""
    held.watch = partial(follow, name)
    rows = list(range(held.size))
    tokens, _ = draw(held.admit([(0,) * prompt] * held.size, rows, rows, 0), sampling, [])
    held.extend(tokens)
    for stretch in (stretch_slots if held.refills else stretch_padded)(held, total - 1):
        stretch(name)
        draw(held.logits(), sampling, [])
    del held.cache.update  # it knows itself by it, and would not be let go of


def follow(name: Name, cache: Any) -> None:
    """`name` is told what each layer of the cache holds after each pass."""
    update = cache.update

    def named(key: Tensor, value: Tensor, layer: int, *given: Any, **more: Any) -> Any:
        found = update(key, value, layer, *given, **more)
        name(kept(cache.layers[layer]))
        return found

    cache.update = named


def kept(layer: Any) -> list[Tensor]:
    both = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return [each for each in both if isinstance(each, Tensor)]


def hold(layer: Any, columns: int, name: Name) -> None:
    """Keys and values of so many tokens, in place of those that are there."""
    shape, dtype = list(layer.keys.shape), layer.keys.dtype
    shape[-2] = columns
    layer.keys = layer.values = None
    layer.keys, layer.values = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
    name(kept(layer))


def stretch_padded(held: Any, columns: int) -> list[Callable[[Name], None]]:
    """The cache, mask and positions as they are when the last token is due."""

    def last(name: Name) -> None:
        for layer in held.cache.layers:
            if not kept(layer):
                continue
            window = getattr(layer, "sliding_window", None)
            hold(layer, columns - 1 if window is None else min(columns - 1, window - 1), name)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = columns - 1
        held.mask = held.mask.new_ones(len(held.places), columns)
        held.positions = held.positions[:, -1:] + 1

    return [last]


def stretch_slots(held: Any, columns: int) -> list[Callable[[Name], None]]:
    """The memory grows for the last time, and then its last column is read."""
    from onecard.rollout.slots import GROWTH

    def grows(name: Name) -> None:
        held.layout.capacity = (columns - 1) // GROWTH * GROWTH
        for layer in held.cache.layers:
            hold(layer, held.layout.capacity, name)
        held.columns = [held.layout.capacity] * held.size

    def last(name: Name) -> None:
        held.columns = [columns - 1] * held.size

    return [last] if held.layout.capacity == columns else [grows, last]
