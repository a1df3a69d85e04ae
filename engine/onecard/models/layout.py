"""The model's door: a flat `TokenBatch` laid out as the model's keyword arguments, packed or padded.

Both layouts come from the same record and give the same hidden states for the same flat rows. `use_cache=False` is
part of the layout, not a matter of memory: with a cache transformers builds no block mask for packed sequences, and the
second sequence silently attends to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.batches import TokenBatch


@dataclass(frozen=True)
class Layout:
    """`inputs`: keyword arguments of the trunk; `places` [n]: where flat row i lies in its flattened output."""

    inputs: dict[str, Any]
    places: Tensor


def packed(batch: TokenBatch) -> Layout:
    """All sequences in one row. Positions that start again tell transformers where the attention blocks end."""
    return Layout(
        inputs={
            "input_ids": batch.tokens.unsqueeze(0),
            "position_ids": batch.positions.unsqueeze(0),
            "use_cache": False,
        },
        places=torch.arange(batch.tokens.numel(), device=batch.tokens.device),
    )


def padded(batch: TokenBatch) -> Layout:
    """One row for each sequence, padded on the right. Token 0 fills the padding: no real token attends to it."""
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
    position_ids = torch.arange(columns, device=batch.tokens.device).expand(rows, -1)
    return Layout(
        inputs={
            "input_ids": tokens.view(rows, columns),
            "attention_mask": mask.view(rows, columns),
            "position_ids": position_ids,
            "use_cache": False,
        },
        places=places,
    )


LAYOUTS: dict[str, Callable[[TokenBatch], Layout]] = {"packed": packed, "padded": padded}
