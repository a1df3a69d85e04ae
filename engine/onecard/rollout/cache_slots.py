"""Rows that each know their own length: where one ends, the next prompt takes its place, and nobody waits.

    columns      0 1 2 3 4 5
    row 0        7 8 9 4 . .     length 4: the next token's keys and values go to column 4
    row 1        5 6 2 2 3 .     length 5
    row 2        1 x x x . .     length 1: a prompt that came in where a longer one had been; x is never looked at

Rows never move, so a step has the same shapes from the first to the last but for the columns that are read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from onecard.models.attention import has_own_attention, windows_of
from onecard.models.trunk import rotation_limit, trunk_of
from onecard.rollout.cuda_graphs import Replayed, recorder_for
from onecard.rollout.decode_batch import DecodeBatch, padded

# Prompts come in when so large a share of the rows is free. To come in costs a pass of its own, however few they are,
# and a free row costs its share of every step.
OPENING_SHARE = 1 / 8
GROWTH = 128  # columns by which the cache grows, up to the longest that a row can be


def takes_slots(model: Any) -> bool:
    """Whether a model's rows can be told their places one by one: masks of our own making go straight to attention, all
    layers keep all keys, and positions are given and mean the same whatever stands beside them."""
    config = trunk_of(model).config
    return (
        has_own_attention(model)
        and "position_ids" in inspect.signature(model.forward).parameters
        and not windows_of(config)
        and rotation_limit(config) is None
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )


class SlotLayout:
    """Where a pass's keys and values go, which all layers share."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # columns
        self.capacity = 0
        self.read = 0  # columns that a step looks at
        self.lengths: Tensor | None = None  # of each row, where a step writes
        self.rows: Tensor | None = None  # where prompts come in
        self.source: Tensor | None = None  # [prompts, width]: the columns without the padding before them

    def grow(self, columns: int) -> None:
        """Room for so many."""
        if columns > self.capacity:
            self.capacity = min(self.limit, -(-columns // GROWTH) * GROWTH)


class SlotLayer(DynamicLayer):
    """Keys and values [rows, heads, capacity, d], of which each pass writes a row's own next columns."""

    _layer_type = None  # else transformers would take it for its own kind of layer from here on

    def __init__(self, layout: SlotLayout, rows: int) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self.layout, self.count = layout, rows

    def get_seq_length(self) -> int:
        return 0 if self.layout.rows is not None else self.layout.read - 1

    def roomy(self, batch: Tensor | None, like: Tensor) -> Tensor:
        """The memory with room for what is to come, zeros where nothing was written: masked is not the same as nan."""
        capacity = self.layout.capacity
        if batch is not None and batch.shape[2] >= capacity:
            return batch
        grown = like.new_zeros(self.count, like.shape[1], capacity, like.shape[3])
        if batch is not None:
            grown[:, :, : batch.shape[2]] = batch
        return grown

    def grow(self) -> None:
        """To the layout's capacity; keys first, so that never both are there twice."""
        if self.keys is not None:
            self.keys = self.roomy(self.keys, self.keys)
            self.values = self.roomy(self.values, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *given: Any, **more: Any) -> tuple[Tensor, Tensor]:
        layout = self.layout
        if self.keys is None:
            self.keys, self.values = self.roomy(None, key_states), self.roomy(None, value_states)
            self.is_initialized = True
        both = ((self.keys, key_states), (self.values, value_states))
        if layout.rows is not None:
            assert layout.source is not None
            for batch, new in both:
                source = layout.source[:, None, :, None].expand_as(new)
                batch[layout.rows, :, : new.shape[2]] = new.gather(2, source)
                batch[layout.rows, :, new.shape[2] :] = 0  # whoever was there may have ended in nan
            return key_states, value_states
        assert layout.lengths is not None
        rows = torch.arange(self.count, device=key_states.device)
        for batch, new in both:
            batch[rows, :, layout.lengths] = new[:, :, 0]
        return self.keys[:, :, : layout.read], self.values[:, :, : layout.read]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.count = len(beam_idx)
        self.keys = self.keys.index_select(0, beam_idx)
        self.values = self.values.index_select(0, beam_idx)


class CacheSlots(DecodeBatch):
    """Rows of at most `limit` columns each; a prompt comes in wherever one has ended."""

    refills = True

    def __init__(self, model: Any, size: int, limit: int, device: torch.device) -> None:
        super().__init__(model, size, device)
        self.layout = SlotLayout(limit)
        recorder = recorder_for(device)
        self.replayed = None if recorder is None else Replayed(recorder)
        self.least_leaving = 0.0 if recorder is None else 0.5  # a pass over fewer rows is recorded anew
        self.places, self.ages, self.lengths, self.tokens = torch.zeros(4, size, dtype=torch.int64, device=device)
        self.owners = [None] * size
        self.columns = [0] * size  # `lengths` on the host

    def new_cache(self) -> Any:
        cache = super().new_cache()
        layers = len(cache.layers) or self.model.config.get_text_config(decoder=True).num_hidden_layers
        cache.layers = [SlotLayer(self.layout, self.size) for _ in range(layers)]
        cache.layer_class_to_replicate = None
        return cache

    @property
    def opening(self) -> int:
        """Rows that are free when prompts come in, and how many come in at once: beside a whole cache there is no
        room for a pass over many prompts."""
        return max(1, math.ceil(OPENING_SHARE * self.size))

    def room(self, waiting: int) -> list[int]:
        free = [row for row, place in enumerate(self.owners) if place is None]
        if len(free) == self.size:  # the first ones, or all have ended at once: then nothing is worth keeping
            self.cache, self.layout.capacity = None, 0
            if self.replayed is not None:
                self.replayed.forget()
            return free[:waiting]
        return free[: min(waiting, self.opening)] if len(free) >= self.opening else []

    def grow(self, columns: int) -> None:
        """Room for so many, here and not inside a pass: what is recorded must find all memory in its place."""
        self.layout.grow(columns)
        for layer in self.cache.layers:
            layer.grow()

    def admit(self, prompts: Sequence[Sequence[int]], places: Sequence[int], rows: Sequence[int]) -> Tensor:
        layout, index = self.layout, torch.tensor(rows, device=self.device)
        self.cache = self.new_cache() if self.cache is None else self.cache
        tokens, mask, positions = padded(prompts, self.device)
        lengths, width = mask.sum(1), mask.shape[1]
        self.grow(width)
        layout.rows = index
        before = (width - lengths).unsqueeze(1)
        layout.source = (torch.arange(width, device=self.device) + before).clamp(max=width - 1)
        logits = self.run(input_ids=tokens, attention_mask=mask, position_ids=positions)
        layout.rows = layout.source = None
        self.places[index] = torch.tensor(places, device=self.device)
        self.ages[index], self.lengths[index] = 0, lengths
        for row, place, prompt in zip(rows, places, prompts, strict=True):
            self.owners[row], self.columns[row] = place, len(prompt)
        return logits

    def inputs(self) -> dict[str, Tensor]:
        layout = self.layout
        going_on = [columns for columns, place in zip(self.columns, self.owners, strict=True) if place is not None]
        self.grow(max(going_on) + 1)
        layout.read = max(going_on) + 1 if self.replayed is None else layout.capacity
        # a row that has ended goes on at its last column, until a prompt comes in
        lengths = self.lengths.clamp(max=layout.read - 1)
        seen = torch.arange(layout.read, device=self.device) <= lengths.unsqueeze(1)
        return {
            "input_ids": self.tokens.unsqueeze(1),
            "attention_mask": seen[:, None, None],
            "position_ids": lengths.unsqueeze(1),
        }

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.replayed is None:
            found = self.write(inputs)
        else:
            found = self.replayed(self.write, inputs, (len(self.owners), self.layout.capacity))
        self.lengths = self.lengths + 1
        self.columns = [columns + 1 for columns in self.columns]
        return found

    def write(self, inputs: dict[str, Tensor]) -> Tensor:
        """One pass; keys and values go where the positions say."""
        self.layout.lengths = inputs["position_ids"].squeeze(1)
        return self.run(**inputs)

    def extend(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        if rows is None:
            self.tokens, self.ages = tokens, self.ages + 1
            return
        index = torch.tensor(rows, device=self.device)
        self.tokens[index] = tokens
        self.ages[index] += 1

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        index = torch.tensor(rows, device=self.device)
        self.lengths, self.tokens = self.lengths[index], self.tokens[index]
        self.columns = [self.columns[row] for row in rows]
        self.size = len(rows)
