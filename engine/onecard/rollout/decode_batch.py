"""The rows that the model runs on: batches, padded on the left, and rows that are run whole, where no cache helps."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def unwatched(cache: Any) -> None:
    """Nobody watches."""


class DecodeBatch(ABC):
    """At most `size` rows, sampled together. `places[i]` says which prompt row i belongs to, `ages[i]` how many tokens
    it has drawn: int64 [rows], on the device; `owners[i]` is the prompt on the host, None where its response has ended.

    Its kinds differ in what they tell the model of a row's place, and so in when a prompt may come in.
    """

    refills: bool  # a prompt may come in while others go on
    least_leaving = 0.0  # of the rows, the share below which it does not pay that some leave

    def __init__(self, model: Any, size: int, device: torch.device) -> None:
        self.model, self.size, self.device = model, size, device
        self.places = self.ages = torch.zeros(0, dtype=torch.int64, device=device)
        self.owners: list[int | None] = []
        self.cache: Any = None
        self.watch: Callable[[Any], None] = unwatched
        known = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known  # not so where attention itself knows distances (ALiBi)
        self.cache_argument = cache_argument(model)

    def new_cache(self) -> Any:
        """A cache of nothing; whoever plans its memory watches what comes into it."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.watch(cache)
        return cache

    @abstractmethod
    def room(self, waiting: int) -> list[int]:
        """The rows in which so many prompts, or as many of them as there is room for, may come in by now."""

    @abstractmethod
    def admit(self, prompts: Sequence[Sequence[int]], places: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Prompts come into these rows: fp32 logits [prompts, V] of their first tokens."""

    @abstractmethod
    def extend(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        """These rows (None: all) go on with one token each."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay."""
        index = torch.tensor(rows, device=self.device)
        self.places, self.ages = self.places[index], self.ages[index]
        self.owners = [self.owners[row] for row in rows]
        self.cache.reorder_cache(index)  # unlike `batch_select_indices`, every kind of layer has it

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """What the model is told of the newest tokens: ids, mask and positions."""

    def logits(self) -> Tensor:
        """One pass over the newest tokens of all rows: fp32 [rows, V], of the token to come."""
        return self.step(self.inputs())

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.run(**inputs)

    def run(self, *, position_ids: Tensor, **inputs: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        cache = {str(self.cache_argument): self.cache}
        output = self.model(use_cache=True, return_dict=True, **cache, **inputs, **positions, **self.last_only)
        logits: Tensor = output.logits[:, -1].float()
        return logits


def cache_argument(model: Any) -> str | None:
    """The argument of a model that takes transformers' cache; None where it has another kind of memory, or none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in known), None)


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and positions of prompts that end together. `7 8 9` and `5` (token 0 pads, and is masked):

    tokens  7 8 9      mask  1 1 1      positions  0 1 2
            0 0 5            0 0 1                 0 0 0
    """
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    tokens = [[0] * more + list(prompt) for more, prompt in zip(padding, prompts, strict=True)]
    mask = torch.tensor([[0] * more + [1] * (width - more) for more in padding], device=device)
    return torch.tensor(tokens, device=device), mask, (mask.cumsum(1) - 1).clamp(min=0)


class PaddedBatch(DecodeBatch):
    """A batch of prompts, padded on the left; the next ones come in when all of them have ended. For any model: what a
    mask and positions can say is all that it has to understand.

    `7 8 9` and `5`, after each has drawn one token:

        mask       1 1 1 1      tokens  4      positions  3
                   0 0 1 1              6                 1

    Columns that are padding for all rows that stay are kept.
    """

    refills = False
    tokens: Tensor
    mask: Tensor
    positions: Tensor

    def room(self, waiting: int) -> list[int]:
        return list(range(min(self.size, waiting))) if set(self.owners) <= {None} else []

    def admit(self, prompts: Sequence[Sequence[int]], places: Sequence[int], rows: Sequence[int]) -> Tensor:
        self.cache = None  # the last batch's is free before the next one's grows
        self.cache = self.new_cache()
        self.owners, self.places = list(places), torch.tensor(places, device=self.device)
        self.ages = torch.zeros_like(self.places)
        self.tokens, self.mask, self.positions = padded(prompts, self.device)
        return self.logits()

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": self.positions}

    def extend(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        self.tokens, self.ages = tokens.unsqueeze(1), self.ages + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        index = torch.tensor(rows, device=self.device)
        self.tokens, self.mask, self.positions = self.tokens[index], self.mask[index], self.positions[index]


class UncachedBatch(DecodeBatch):
    """Rows that are run whole for each token, one after another: exact for every model, and slow for long rows."""

    refills = True

    def __init__(self, model: Any, size: int, device: torch.device) -> None:
        super().__init__(model, size, device)
        self.places, self.ages = torch.zeros(2, size, dtype=torch.int64, device=device)
        self.owners = [None] * size
        self.texts: list[list[int]] = [[] for _ in range(size)]

    def room(self, waiting: int) -> list[int]:
        return [row for row, place in enumerate(self.owners) if place is None][:waiting]

    def admit(self, prompts: Sequence[Sequence[int]], places: Sequence[int], rows: Sequence[int]) -> Tensor:
        index = torch.tensor(rows, device=self.device)
        self.places[index], self.ages[index] = torch.tensor(places, device=self.device), 0
        for row, place, prompt in zip(rows, places, prompts, strict=True):
            self.owners[row], self.texts[row] = place, list(prompt)
        return torch.cat([self.run_text(row) for row in rows])

    def extend(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        index = list(range(len(self.texts))) if rows is None else list(rows)
        for row, token in zip(index, tokens.tolist(), strict=True):
            self.texts[row].append(token)
        self.ages[torch.tensor(index, device=self.device)] += 1

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.places, self.ages = self.places[index], self.ages[index]
        self.owners, self.texts = [self.owners[row] for row in rows], [self.texts[row] for row in rows]

    def inputs(self) -> dict[str, Tensor]:
        raise NotImplementedError("rows that are run whole have no newest tokens")

    def logits(self) -> Tensor:
        """One pass for each row; rows that have ended are not run."""
        found = {row: self.run_text(row) for row, place in enumerate(self.owners) if place is not None}
        nothing = torch.zeros_like(next(iter(found.values())))
        return torch.cat([found.get(row, nothing) for row in range(len(self.owners))])

    def run_text(self, row: int) -> Tensor:
        ids = torch.tensor([self.texts[row]], device=self.device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False, return_dict=True, **self.last_only).logits
        return logits[:, -1].float()
