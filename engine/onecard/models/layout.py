"""A flat `TokenBatch` as the keyword arguments of the model's passes: packed, padded, or one sequence a pass.

All layouts come from the same record and give the same hidden states for the same flat rows. `use_cache=False` is
part of the layout, not a matter of memory: with a cache transformers builds no block mask for packed sequences, and the
second sequence silently attends to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from onecard.data.batches import TokenBatch
from onecard.models.attention import PACKED_MASK, segments_of


@dataclass(frozen=True)
class Layout:
    """`passes`: keyword arguments of the trunk for each pass; `places` [n]: where flat row i lies in their flattened
    outputs, one after another.
    """

    passes: tuple[dict[str, Any], ...]
    places: Tensor


def packed(batch: TokenBatch) -> Layout:
    """All sequences in one row, each with its own attention (`models/attention.py`): no pair of tokens is masked.

    A mask of four dimensions is one that transformers takes as it is; no layer looks at it.
    """
    inputs = {
        "input_ids": batch.tokens.unsqueeze(0),
        "position_ids": batch.positions.unsqueeze(0),
        "attention_mask": torch.ones(PACKED_MASK, dtype=torch.bool, device=batch.tokens.device),
        "segments": segments_of(batch),
        "use_cache": False,
    }
    return Layout((inputs,), torch.arange(batch.num_tokens, device=batch.tokens.device))


def apart(batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
    """The record with shared prompts laid again before each sequence, and where each of its rows lies then."""
    shared = batch.shared
    if shared is None:
        return batch, torch.arange(batch.num_tokens, device=batch.tokens.device)
    prompts = [stop - start for start, stop in shared.spans]
    lengths = tuple(own + prompt for own, prompt in zip(batch.lengths, prompts, strict=True))
    ends = accumulate(lengths)
    places = [row for own, end in zip(batch.lengths, ends, strict=True) for row in range(end - own, end)]
    whole = replace(
        batch,
        tokens=batch.tokens[shared.key_rows],
        positions=batch.positions[shared.key_rows],
        cu_seqlens=shared.cu_seqlens,
        lengths=lengths,
        shared=None,
    )
    return whole, torch.tensor(places, device=batch.tokens.device)


def restarted(batch: TokenBatch) -> Layout:
    """All sequences in one row. Positions that start again tell transformers to mask one sequence from another."""
    batch, places = apart(batch)
    inputs = {
        "input_ids": batch.tokens.unsqueeze(0),
        "position_ids": batch.positions.unsqueeze(0),
        "use_cache": False,
    }
    return Layout((inputs,), places)


def padded(batch: TokenBatch) -> Layout:
    """One row for each sequence, padded on the right. Token 0 fills the padding: no real token attends to it."""
    batch, own = apart(batch)
    rows, columns = len(batch.lengths), max(batch.lengths)
    lengths = batch.cu_seqlens.diff().to(torch.int64)
    sequence_of = torch.repeat_interleave(
        torch.arange(rows, device=lengths.device), lengths, output_size=batch.num_tokens
    )
    places = sequence_of * columns + batch.positions
    tokens = torch.zeros(rows * columns, dtype=torch.int64, device=batch.tokens.device)
    mask = torch.zeros_like(tokens)
    tokens[places] = batch.tokens
    mask[places] = 1
    inputs = {
        "input_ids": tokens.view(rows, columns),
        "attention_mask": mask.view(rows, columns),
        "position_ids": torch.arange(columns, device=batch.tokens.device).expand(rows, -1),
        "use_cache": False,
    }
    return Layout((inputs,), places[own])


def single(batch: TokenBatch) -> Layout:
    """A pass for each sequence: what the model computes of it by itself, whatever kind of model it is."""
    batch, places = apart(batch)
    passes = tuple({"input_ids": each.unsqueeze(0), "use_cache": False} for each in batch.tokens.split(batch.lengths))
    return Layout(passes, places)


LAYOUTS: dict[str, Callable[[TokenBatch], Layout]] = {
    "packed": packed,
    "restarted": restarted,
    "padded": padded,
    "single": single,
}
