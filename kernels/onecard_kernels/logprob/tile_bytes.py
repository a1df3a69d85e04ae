"""The linear path's buffers in bytes: what the operators' workspace formulas add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import launch
from ..records import result_dtype
from . import rows
from .matmul import SCRATCH_ROWS, operand_dtype
from .online_softmax import SLOTS
from .tiles import padded
from .tuning import choose, columns_of

IDS = 8  # bytes of an int64
STATISTICS = SLOTS + 14  # numbers per token while a step's statistics are put together


@dataclass(frozen=True)
class TileBytes:
    """`tiles.HeadTiles` in numbers."""

    device: torch.device
    dtype: torch.dtype  # of logits
    tokens: int
    width: int  # of hidden states
    step: int  # tokens of a tile
    columns: int  # of a tile
    count: int  # tiles of the vocabulary
    accumulated: int  # bytes of a logit
    operand: int  # bytes of a number of the products' operands
    weight_itemsize: int
    buffers: int  # bytes

    @classmethod
    def of(
        cls,
        device: torch.device,
        hidden: Tensor,
        weight: Tensor,
        tokens: int,
        *,
        chunk_tokens: int | None,
        exp_operand: bool,
        entropy_term: bool,
        only: str | None = None,
    ) -> TileBytes:
        dtype = result_dtype(hidden.dtype, weight.dtype)
        operand = operand_dtype(hidden.dtype, weight.dtype, dtype, device)
        vocabulary, width = weight.shape
        sizes = choose(vocabulary, dtype, device, only=only, chunk_tokens=chunk_tokens)
        most = max(1, min(sizes.rows, tokens))
        columns = columns_of(sizes, vocabulary, most)
        size = most * padded(columns)
        buffers = size * dtype.itemsize
        if exp_operand and operand != dtype:
            buffers += size * operand.itemsize
        if entropy_term:
            buffers += size * (operand if exp_operand else dtype).itemsize
        if weight.dtype != operand:
            buffers += min(SCRATCH_ROWS, columns) * width * operand.itemsize
        return cls(
            device=device,
            dtype=dtype,
            tokens=tokens,
            width=width,
            step=even_step(tokens, most),
            columns=columns,
            count=math.ceil(vocabulary / columns),
            accumulated=dtype.itemsize,
            operand=operand.itemsize,
            weight_itemsize=weight.dtype.itemsize,
            buffers=buffers,
        )

    @property
    def logits(self) -> int:
        """Numbers of a tile."""
        return self.step * self.columns

    @property
    def hidden_rows(self) -> int:
        """Numbers of a step's hidden states."""
        return self.step * self.width

    @property
    def target_rows(self) -> int:
        """Bytes of a block of the head's rows of the targets, as they are and as they are added."""
        block = min(self.step, max(1, rows.BLOCK_BYTES // (self.width * self.accumulated)))
        cast = 0 if self.weight_itemsize == self.accumulated else self.accumulated
        return block * self.width * (self.weight_itemsize + cast)

    def per_token(self, numbers: int) -> int:
        return self.step * numbers * self.accumulated

    def exp_pass(self, backend: str, *, entropy_term: bool, slope: bool) -> int:
        """Bytes inside the pass over a tile: a block for the entropy's term, another for the softcap's derivative."""
        if by_triton(self.device, backend, self.dtype):
            return 0
        return block_bytes(self.device, self.step, self.columns, self.accumulated) * (entropy_term + slope)

    def taken(self, hidden: Tensor, *, masked: bool, sweep: int) -> int:
        """A step's own rows of the hidden states (gathered, cast, or gathered then cast), and `sweep`, what follows.

        The rows of the step before are freed only when the new ones are there.
        """
        gathered, cast = masked or rows.flat_view(hidden) is None, hidden.dtype.itemsize != self.operand
        kept = self.hidden_rows * self.operand * (cast or gathered)
        taking = kept + self.hidden_rows * hidden.dtype.itemsize * (gathered and cast)
        return max(taking + kept * (self.tokens > self.step), kept + sweep)


def even_step(tokens: int, most: int) -> int:
    """Tokens of each of the fewest equal steps of at most `most`."""
    return math.ceil(tokens / math.ceil(tokens / most)) if tokens else 0


def block_bytes(device: torch.device, count: int, columns: int, itemsize: int) -> int:
    """Bytes of one elementwise block of `count` rows."""
    size = rows.CUDA_BLOCK_BYTES if device.type == "cuda" else rows.BLOCK_BYTES
    return min(count, max(1, size // (columns * itemsize))) * columns * itemsize


def by_triton(device: torch.device, backend: str, dtype: torch.dtype) -> bool:
    """Whether Triton runs the passes over tiles, which then hold nothing. A GPU that is asked about has Triton."""
    if backend == "torch" or dtype == torch.float64:
        return False
    return device.type == "cuda" or (backend == "triton" and launch.unavailable_reason(device) is None)


def id_bytes(targets: Tensor, *, masked: bool) -> int:
    """Indices of the valid tokens, and these tokens' targets."""
    return targets.numel() * IDS * (2 if masked else int(targets.dtype != torch.int64))
