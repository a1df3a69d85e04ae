"""Decode batches: the rows that one forward pass decodes together. Here: left-padded rows, and rows without a cache."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def ignore_cache(cache: Any) -> None:
    """Default of `CachedBatch.on_new_cache`: does nothing."""


class DecodeBatch(ABC):
    """At most `size` rows that are decoded together.

    | attribute | shape | of row i |
    |---|---|---|
    | `prompt_indices` | int64 [rows], on the device | the index of its prompt |
    | `generated` | int64 [rows], on the device | the number of tokens sampled so far |
    | `row_prompts` | list [rows], on the host | the index of its prompt; None if the row is free |

    A row is free before its first prompt and after its response has ended. Subclasses differ in the positions and masks
    that they pass to the model, and in when a prompt can be prefilled.
    """

    continuous: bool  # continuous batching: a prompt can be prefilled while other rows are still decoding
    min_free_share = 0.0  # free rows are removed only when they are at least this share of all rows

    def __init__(self, model: Any, size: int, device: torch.device) -> None:
        self.model, self.size, self.device = model, size, device
        self.prompt_indices = self.generated = torch.zeros(0, dtype=torch.int64, device=device)
        self.row_prompts: list[int | None] = []
        parameters = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @abstractmethod
    def free_rows(self, waiting: int) -> list[int]:
        """The rows to prefill now, at most `waiting`. Empty if no prompt can be prefilled now."""

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]], indices: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Put prompts into these rows and run the model on them. Returns fp32 logits [prompts, V] of the next tokens.

        `indices`: the prompts' indices, which `row_prompts` and `prompt_indices` then have.
        """

    @abstractmethod
    def append(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        """Append a sampled token to each of these rows (None: all). `tokens` int64 [rows]."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Run one decoding step on all rows. Returns fp32 logits [rows, V] of the next tokens."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(rows, device=self.device)
        self.prompt_indices, self.generated = self.prompt_indices[index], self.generated[index]
        self.row_prompts = [self.row_prompts[row] for row in rows]


class CachedBatch(DecodeBatch):
    """A decode batch with a KV cache: a decoding step runs the model on the newest token of each row.

    `on_new_cache` is called with each new cache; the memory planner uses this to track allocations.
    """

    def __init__(self, model: Any, size: int, device: torch.device) -> None:
        super().__init__(model, size, device)
        self.cache: Any = None
        self.on_new_cache: Callable[[Any], None] = ignore_cache
        self.cache_argument = cache_argument(model)
        # false for models whose attention computes distances itself (ALiBi)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def new_cache(self) -> Any:
        """An empty cache."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.on_new_cache(cache)
        return cache

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        # every type of cache layer has `reorder_cache`, but not `batch_select_indices`
        self.cache.reorder_cache(torch.tensor(rows, device=self.device))

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """The model's inputs for the newest tokens: ids, mask and positions."""

    def logits(self) -> Tensor:
        return self.step(self.inputs())

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.forward(**inputs)

    def forward(self, *, position_ids: Tensor, **inputs: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        cache = {str(self.cache_argument): self.cache}
        output = self.model(use_cache=True, return_dict=True, **cache, **inputs, **positions, **self.last_only)
        logits: Tensor = output.logits[:, -1].float()
        return logits


def cache_argument(model: Any) -> str | None:
    """The name of the model's argument for a transformers cache; None if it has no cache, or one of another type."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded tokens, mask and positions, int64 [prompts, width] each. For `7 8 9` and `5` (padding has token 0):

    tokens  7 8 9      mask  1 1 1      positions  0 1 2
            0 0 5            0 0 1                 0 0 0
    """
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    tokens = [[0] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
    mask = torch.tensor([[0] * count + [1] * (width - count) for count in padding], device=device)
    return torch.tensor(tokens, device=device), mask, (mask.cumsum(1) - 1).clamp(min=0)


class PaddedBatch(CachedBatch):
    """A left-padded batch of prompts. The next prompts are prefilled when all of its responses have ended.

    It works with any model that has a cache and uses a mask and positions.

    `7 8 9` and `5`, after one sampled token each:

        mask       1 1 1 1      tokens  4      positions  3
                   0 0 1 1              6                 1

    Columns that are padding in all remaining rows are not removed.
    """

    continuous = False
    tokens: Tensor
    mask: Tensor
    positions: Tensor

    def free_rows(self, waiting: int) -> list[int]:
        return list(range(min(self.size, waiting))) if set(self.row_prompts) <= {None} else []

    def prefill(self, prompts: Sequence[Sequence[int]], indices: Sequence[int], rows: Sequence[int]) -> Tensor:
        self.cache = None  # free the previous batch's cache before the new one is allocated
        self.cache = self.new_cache()
        self.row_prompts, self.prompt_indices = list(indices), torch.tensor(indices, device=self.device)
        self.generated = torch.zeros_like(self.prompt_indices)
        self.tokens, self.mask, self.positions = padded(prompts, self.device)
        return self.logits()

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": self.positions}

    def append(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        self.tokens, self.generated = tokens.unsqueeze(1), self.generated + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        index = torch.tensor(rows, device=self.device)
        self.tokens, self.mask, self.positions = self.tokens[index], self.mask[index], self.positions[index]


class UncachedBatch(DecodeBatch):
    """A decode batch without a cache: for each new token, the model runs on all tokens of one row after the other.

    It is exact for every model, and slow for long rows.
    """

    continuous = True

    def __init__(self, model: Any, size: int, device: torch.device) -> None:
        super().__init__(model, size, device)
        self.prompt_indices, self.generated = torch.zeros(2, size, dtype=torch.int64, device=device)
        self.row_prompts = [None] * size
        self.row_tokens: list[list[int]] = [[] for _ in range(size)]

    def free_rows(self, waiting: int) -> list[int]:
        return [row for row, index in enumerate(self.row_prompts) if index is None][:waiting]

    def prefill(self, prompts: Sequence[Sequence[int]], indices: Sequence[int], rows: Sequence[int]) -> Tensor:
        index = torch.tensor(rows, device=self.device)
        self.prompt_indices[index], self.generated[index] = torch.tensor(indices, device=self.device), 0
        for row, prompt_index, prompt in zip(rows, indices, prompts, strict=True):
            self.row_prompts[row], self.row_tokens[row] = prompt_index, list(prompt)
        return torch.cat([self.forward_row(row) for row in rows])

    def append(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        appended = list(range(len(self.row_tokens))) if rows is None else list(rows)
        for row, token in zip(appended, tokens.tolist(), strict=True):
            self.row_tokens[row].append(token)
        self.generated[torch.tensor(appended, device=self.device)] += 1

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self.row_tokens = [self.row_tokens[row] for row in rows]

    def logits(self) -> Tensor:
        """One forward pass for each row that is not free; the logits of free rows are 0."""
        results = {row: self.forward_row(row) for row, index in enumerate(self.row_prompts) if index is not None}
        zeros = torch.zeros_like(next(iter(results.values())))
        return torch.cat([results.get(row, zeros) for row in range(len(self.row_prompts))])

    def forward_row(self, row: int) -> Tensor:
        ids = torch.tensor([self.row_tokens[row]], device=self.device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False, return_dict=True, **self.last_only).logits
        return logits[:, -1].float()
