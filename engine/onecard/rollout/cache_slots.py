"""Continuous batching: each row of the cache has its own length, and a finished row takes the next prompt.

    columns      0 1 2 3 4 5
    row 0        7 8 9 4 . .     length 4: the next token's keys and values go to column 4
    row 1        5 6 2 2 3 .     length 5
    row 2        1 x x x . .     length 1: x is of the row's previous sequence, and is masked

Rows never move. All steps have the same shapes, except for the number of columns that attention reads.
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

from onecard.models.attention import has_onecard_attention, windows_of
from onecard.models.trunk import rotation_limit, trunk_of
from onecard.rollout.cuda_graphs import CapturedPass, capture_function_for
from onecard.rollout.decode_batch import CachedBatch, padded

# Prompts are prefilled when at least this share of the rows is free. A prefill is a separate forward pass, also for one
# prompt. Until then a free row wastes its share of every decoding step.
REFILL_SHARE = 1 / 8
GROWTH = 128  # columns by which the cache grows, up to the longest possible row


def supports_slots(model: Any) -> bool:
    """Whether a model can decode rows of different lengths in one cache.

    Attention must use onecard's masks, and all layers must keep all keys. The model must take `position_ids`, and its
    rotary embeddings must not depend on the longest position, which may be that of another row.
    """
    config = trunk_of(model).config
    return (
        has_onecard_attention(model)
        and "position_ids" in inspect.signature(model.forward).parameters
        and not windows_of(config)
        and rotation_limit(config) is None
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )


class SlotLayout:
    """The rows and columns where a forward pass writes its keys and values. All layers share one layout."""

    def __init__(self, max_columns: int) -> None:
        self.max_columns = max_columns
        self.capacity = 0  # columns allocated
        self.num_read = 0  # columns that a decoding step attends to
        self.lengths: Tensor | None = None  # int64 [rows]: the column that a decoding step writes
        self.prefill_rows: Tensor | None = None  # int64 [prompts]: the rows that a prefill writes; None while decoding
        self.source: Tensor | None = None  # int64 [prompts, width]: cache column -> column of the left-padded prompt

    def grow(self, columns: int) -> None:
        """Raise `capacity` to at least this many columns, in multiples of GROWTH, at most `max_columns`."""
        if columns > self.capacity:
            self.capacity = min(self.max_columns, -(-columns // GROWTH) * GROWTH)


class SlotLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, capacity, d]. Each pass writes the next columns of each row."""

    _layer_type = None  # keeps transformers from registering this class as its own layer type

    def __init__(self, layout: SlotLayout, row_count: int) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self.layout, self.row_count = layout, row_count

    def get_seq_length(self) -> int:
        return 0 if self.layout.prefill_rows is not None else self.layout.num_read - 1

    def with_capacity(self, stored: Tensor | None, like: Tensor) -> Tensor:
        """`stored` extended to the layout's capacity. New columns are 0: a masked NaN would still give NaN."""
        capacity = self.layout.capacity
        if stored is not None and stored.shape[2] >= capacity:
            return stored
        extended = like.new_zeros(self.row_count, like.shape[1], capacity, like.shape[3])
        if stored is not None:
            extended[:, :, : stored.shape[2]] = stored
        return extended

    def grow(self) -> None:
        """Extend to the layout's capacity. Keys first, then values, so that only one of them is in memory twice."""
        if self.keys is not None:
            self.keys = self.with_capacity(self.keys, self.keys)
            self.values = self.with_capacity(self.values, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layout = self.layout
        if self.keys is None:
            self.keys, self.values = self.with_capacity(None, key_states), self.with_capacity(None, value_states)
            self.is_initialized = True
        both = ((self.keys, key_states), (self.values, value_states))
        if layout.prefill_rows is not None:
            assert layout.source is not None
            for stored, new in both:
                source = layout.source[:, None, :, None].expand_as(new)
                stored[layout.prefill_rows, :, : new.shape[2]] = new.gather(2, source)
                stored[layout.prefill_rows, :, new.shape[2] :] = 0  # the previous sequence may have left NaN here
            return key_states, value_states
        assert layout.lengths is not None
        rows = torch.arange(self.row_count, device=key_states.device)
        for stored, new in both:
            stored[rows, :, layout.lengths] = new[:, :, 0]
        return self.keys[:, :, : layout.num_read], self.values[:, :, : layout.num_read]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.row_count = len(beam_idx)
        self.keys = self.keys.index_select(0, beam_idx)
        self.values = self.values.index_select(0, beam_idx)


class CacheSlots(CachedBatch):
    """A decode batch with continuous batching: `size` rows of at most `max_columns` columns.

    `lengths` int64 [rows] (on the device) and `host_lengths` (a list) have the number of cached tokens of each row.
    """

    continuous = True

    def __init__(self, model: Any, size: int, max_columns: int, device: torch.device) -> None:
        super().__init__(model, size, device)
        self.layout = SlotLayout(max_columns)
        capture = capture_function_for(device)
        self.captured_pass = None if capture is None else CapturedPass(capture)
        self.min_free_share = 0.0 if capture is None else 0.5  # with fewer rows, the pass must be captured again
        state = torch.zeros(4, size, dtype=torch.int64, device=device)
        self.prompt_indices, self.generated, self.lengths, self.tokens = state
        self.row_prompts = [None] * size
        self.host_lengths = [0] * size

    def new_cache(self) -> Any:
        cache = super().new_cache()
        layers = len(cache.layers) or self.model.config.get_text_config(decoder=True).num_hidden_layers
        cache.layers = [SlotLayer(self.layout, self.size) for _ in range(layers)]
        cache.layer_class_to_replicate = None
        return cache

    @property
    def refill_size(self) -> int:
        """The number of rows that must be free before a prefill; a prefill of waiting prompts has at most as many.

        More prompts would need too much memory beside a full cache.
        """
        return max(1, math.ceil(REFILL_SHARE * self.size))

    def free_rows(self, waiting: int) -> list[int]:
        free = [row for row, index in enumerate(self.row_prompts) if index is None]
        if len(free) == self.size:  # no row is decoding: nothing in the cache is needed
            self.cache, self.layout.capacity = None, 0
            if self.captured_pass is not None:
                self.captured_pass.discard()
            return free[:waiting]
        return free[: min(waiting, self.refill_size)] if len(free) >= self.refill_size else []

    def grow(self, columns: int) -> None:
        """Extend the cache to this many columns. Not called inside a pass: a captured pass needs fixed addresses."""
        self.layout.grow(columns)
        for layer in self.cache.layers:
            layer.grow()

    def prefill(self, prompts: Sequence[Sequence[int]], indices: Sequence[int], rows: Sequence[int]) -> Tensor:
        layout, index = self.layout, torch.tensor(rows, device=self.device)
        self.cache = self.new_cache() if self.cache is None else self.cache
        tokens, mask, positions = padded(prompts, self.device)
        lengths, width = mask.sum(1), mask.shape[1]
        self.grow(width)
        layout.prefill_rows = index
        padding = (width - lengths).unsqueeze(1)
        layout.source = (torch.arange(width, device=self.device) + padding).clamp(max=width - 1)
        logits = self.forward(input_ids=tokens, attention_mask=mask, position_ids=positions)
        layout.prefill_rows = layout.source = None
        self.prompt_indices[index] = torch.tensor(indices, device=self.device)
        self.generated[index], self.lengths[index] = 0, lengths
        for row, prompt_index, prompt in zip(rows, indices, prompts, strict=True):
            self.row_prompts[row], self.host_lengths[row] = prompt_index, len(prompt)
        return logits

    def inputs(self) -> dict[str, Tensor]:
        layout = self.layout
        rows = zip(self.host_lengths, self.row_prompts, strict=True)
        longest = max(length for length, index in rows if index is not None)
        self.grow(longest + 1)
        layout.num_read = longest + 1 if self.captured_pass is None else layout.capacity
        # a free row keeps writing to its last column until it is prefilled
        lengths = self.lengths.clamp(max=layout.num_read - 1)
        visible = torch.arange(layout.num_read, device=self.device) <= lengths.unsqueeze(1)
        return {
            "input_ids": self.tokens.unsqueeze(1),
            "attention_mask": visible[:, None, None],
            "position_ids": lengths.unsqueeze(1),
        }

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.captured_pass is None:
            logits = self.forward_step(inputs)
        else:
            logits = self.captured_pass(self.forward_step, inputs, (len(self.row_prompts), self.layout.capacity))
        self.lengths = self.lengths + 1
        self.host_lengths = [length + 1 for length in self.host_lengths]
        return logits

    def forward_step(self, inputs: dict[str, Tensor]) -> Tensor:
        """One decoding step. Each row's keys and values are written to the column of its `position_ids`."""
        self.layout.lengths = inputs["position_ids"].squeeze(1)
        return self.forward(**inputs)

    def append(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        if rows is None:
            self.tokens, self.generated = tokens, self.generated + 1
            return
        index = torch.tensor(rows, device=self.device)
        self.tokens[index] = tokens
        self.generated[index] += 1

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        index = torch.tensor(rows, device=self.device)
        self.lengths, self.tokens = self.lengths[index], self.tokens[index]
        self.host_lengths = [self.host_lengths[row] for row in rows]
        self.size = len(rows)
