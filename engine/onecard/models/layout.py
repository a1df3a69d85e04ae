"""Converts a flat `TokenBatch` to the inputs of the model's forward passes: packed, padded, or one sequence per pass.

All layouts give the same hidden states for the same flat rows. `use_cache=False` is necessary for correctness: with a
cache, transformers creates no block mask for packed sequences, and the second sequence would attend to the first
without an error.
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
    """How a batch is given to the trunk: `passes` are the keyword arguments of each forward pass.

    `rows` int64 [n]: the row of token i in the outputs of all passes, flattened and concatenated.
    """

    passes: tuple[dict[str, Any], ...]
    rows: Tensor


def packed(batch: TokenBatch) -> Layout:
    """All sequences in one row; attention is per sequence (`models/attention.py`), without a mask over pairs of tokens.

    The attention mask is a 4-D placeholder, which transformers passes on unchanged and no layer reads.
    """
    inputs = {
        "input_ids": batch.tokens.unsqueeze(0),
        "position_ids": batch.positions.unsqueeze(0),
        "attention_mask": torch.ones(PACKED_MASK, dtype=torch.bool, device=batch.tokens.device),
        "segments": segments_of(batch),
        "use_cache": False,
    }
    return Layout((inputs,), torch.arange(batch.num_tokens, device=batch.tokens.device))


def repeat_shared_prompts(batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
    """The batch with each shared prompt repeated before its sequences, and the new index of each row [n]."""
    shared = batch.shared
    if shared is None:
        return batch, torch.arange(batch.num_tokens, device=batch.tokens.device)
    prompts = [stop - start for start, stop in shared.spans]
    lengths = tuple(length + prompt for length, prompt in zip(batch.lengths, prompts, strict=True))
    ends = accumulate(lengths)
    indices = [row for length, end in zip(batch.lengths, ends, strict=True) for row in range(end - length, end)]
    repeated = replace(
        batch,
        tokens=batch.tokens[shared.key_rows],
        positions=batch.positions[shared.key_rows],
        cu_seqlens=shared.cu_seqlens,
        lengths=lengths,
        shared=None,
    )
    return repeated, torch.tensor(indices, device=batch.tokens.device)


def restarted(batch: TokenBatch) -> Layout:
    """All sequences in one row. transformers masks one sequence from another where positions restart at 0."""
    batch, indices = repeat_shared_prompts(batch)
    inputs = {
        "input_ids": batch.tokens.unsqueeze(0),
        "position_ids": batch.positions.unsqueeze(0),
        "use_cache": False,
    }
    return Layout((inputs,), indices)


def padded(batch: TokenBatch) -> Layout:
    """One row per sequence, right-padded with token 0. No token of a sequence attends to the padding."""
    batch, batch_rows = repeat_shared_prompts(batch)
    rows, columns = len(batch.lengths), max(batch.lengths)
    lengths = batch.cu_seqlens.diff().to(torch.int64)
    sequence_of = torch.repeat_interleave(
        torch.arange(rows, device=lengths.device), lengths, output_size=batch.num_tokens
    )
    indices = sequence_of * columns + batch.positions
    tokens = torch.zeros(rows * columns, dtype=torch.int64, device=batch.tokens.device)
    mask = torch.zeros_like(tokens)
    tokens[indices] = batch.tokens
    mask[indices] = 1
    inputs = {
        "input_ids": tokens.view(rows, columns),
        "attention_mask": mask.view(rows, columns),
        "position_ids": torch.arange(columns, device=batch.tokens.device).expand(rows, -1),
        "use_cache": False,
    }
    return Layout((inputs,), indices[batch_rows])


def single(batch: TokenBatch) -> Layout:
    """One forward pass per sequence, which is correct for every kind of model."""
    batch, indices = repeat_shared_prompts(batch)
    sequences = batch.tokens.split(batch.lengths)
    passes = tuple({"input_ids": tokens.unsqueeze(0), "use_cache": False} for tokens in sequences)
    return Layout(passes, indices)


LAYOUTS: dict[str, Callable[[TokenBatch], Layout]] = {
    "packed": packed,
    "restarted": restarted,
    "padded": padded,
    "single": single,
}
