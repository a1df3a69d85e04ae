"""The linear path's buffers in numbers: what `workspace` adds up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import launch
from .logprob import passes
from .logprob.plans import Plan, columns_of
from .logprob.products import SCRATCH_ROWS, operand_dtype
from .logprob.tiles import _padded

IDS = 8  # bytes of an int64


@dataclass(frozen=True)
class Tiles:
    """The linear path's buffers and steps for some tokens; bytes but for `tokens`, `step`, `columns`, `count`.

    `accumulated`, `operand`: bytes of a number of these dtypes.
    """

    tokens: int
    step: int
    columns: int
    count: int
    accumulated: int
    operand: int
    buffers: int
    block: int  # one elementwise block of a tile

    def per_token(self, numbers: int) -> int:
        return self.step * numbers * self.accumulated


def is_flat(x: Tensor) -> bool:
    """Whether rows of `[..., D]` are views, so that nothing is gathered."""
    return passes._flat_view(x) is not None


def accumulated_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return passes.result_dtype(hidden.dtype, weight.dtype)


def block_bytes(device: torch.device, rows: int, columns: int, itemsize: int) -> int:
    size = passes.CUDA_BLOCK_BYTES if device.type == "cuda" else passes.BLOCK_BYTES
    return min(rows, max(1, size // (columns * itemsize))) * columns * itemsize


def tiles_of(
    device: torch.device, hidden: Tensor, weight: Tensor, tokens: int, plan: Plan, *, direction: bool, spread: bool
) -> Tiles:
    """`logprob.tiles.Workspace` in numbers."""
    accumulated = accumulated_dtype(hidden, weight)
    operand = operand_dtype(hidden.dtype, weight.dtype, accumulated, device)
    vocabulary, width = weight.shape
    rows = max(1, min(plan.rows, tokens))
    columns = columns_of(plan, vocabulary, rows)
    step = math.ceil(tokens / math.ceil(tokens / rows)) if tokens else 0
    size = rows * _padded(columns)
    buffers = size * accumulated.itemsize
    if direction and operand != accumulated:
        buffers += size * operand.itemsize
    if spread:
        buffers += size * (operand if direction else accumulated).itemsize
    if weight.dtype != operand:
        buffers += min(SCRATCH_ROWS, columns) * width * operand.itemsize
    return Tiles(
        tokens,
        step,
        columns,
        math.ceil(vocabulary / columns),
        accumulated.itemsize,
        operand.itemsize,
        buffers,
        block_bytes(device, step, columns, accumulated.itemsize),
    )


def taken(hidden: Tensor, tiles: Tiles, *, gathered: bool, sweep: int) -> int:
    """A step's own rows of the hidden states (a gather, a cast, or one after the other), and `sweep`, what comes then.

    The rows of the step before are let go of only when the new ones are there.
    """
    rows, cast = tiles.step * hidden.shape[-1], hidden.dtype.itemsize != tiles.operand
    held = rows * tiles.operand * (cast or gathered)
    taking = held + rows * hidden.dtype.itemsize * (gathered and cast)
    return max(taking + held * (tiles.tokens > tiles.step), held + sweep)


def by_triton(device: torch.device, backend: str, dtype: torch.dtype) -> bool:
    """Whether the passes over tiles are Triton's there, which hold nothing: a GPU that is asked about has it."""
    if backend == "torch" or dtype == torch.float64:
        return False
    return device.type == "cuda" or (backend == "triton" and launch.why_not(device) is None)


def ids(targets: Tensor, *, gathered: bool) -> int:
    """Indices of the valid tokens, and these tokens' targets."""
    count = targets.numel()
    return count * IDS * (2 if gathered else int(targets.dtype != torch.int64))


def pass_bytes(tiles: Tiles, *, triton: bool, held: bool, slope: bool) -> int:
    """Of the pass over a tile in torch: a block for sums of e (z - shift), another for the softcap's derivative."""
    return 0 if triton else tiles.block * (held + slope)


def target_rows(weight: Tensor, tiles: Tiles) -> int:
    """A block of the head's rows of the targets, as they are and as they are added."""
    rows = min(tiles.step, max(1, passes.BLOCK_BYTES // (weight.shape[1] * tiles.accumulated)))
    cast = 0 if weight.dtype.itemsize == tiles.accumulated else tiles.accumulated
    return rows * weight.shape[1] * (weight.dtype.itemsize + cast)
