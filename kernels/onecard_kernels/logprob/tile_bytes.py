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
STATISTICS = SLOTS + 14  # numbers per token while the statistics of a chunk are computed


@dataclass(frozen=True)
class TileBytes:
    """Sizes and bytes of `tiles.HeadTiles`, without tensors."""

    device: torch.device
    dtype: torch.dtype  # of logits
    tokens: int
    width: int  # of hidden states
    chunk: int  # tokens of a tile
    columns: int  # of a tile
    count: int  # tiles of the vocabulary
    accumulator_itemsize: int  # bytes of a logit
    operand_itemsize: int  # bytes of an element of the products' operands
    weight_itemsize: int
    buffers: int  # bytes of all buffers

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
            chunk=even_chunk(tokens, most),
            columns=columns,
            count=math.ceil(vocabulary / columns),
            accumulator_itemsize=dtype.itemsize,
            operand_itemsize=operand.itemsize,
            weight_itemsize=weight.dtype.itemsize,
            buffers=buffers,
        )

    @property
    def logits(self) -> int:
        """Elements of a tile."""
        return self.chunk * self.columns

    @property
    def hidden_rows(self) -> int:
        """Elements of a chunk's hidden states."""
        return self.chunk * self.width

    @property
    def target_rows(self) -> int:
        """Bytes of a block of the head's rows of the targets, in the head's dtype and cast."""
        block = min(self.chunk, max(1, rows.BLOCK_BYTES // (self.width * self.accumulator_itemsize)))
        cast = 0 if self.weight_itemsize == self.accumulator_itemsize else self.accumulator_itemsize
        return block * self.width * (self.weight_itemsize + cast)

    def per_token(self, numbers: int) -> int:
        return self.chunk * numbers * self.accumulator_itemsize

    def exp_pass(self, backend: str, *, entropy_term: bool, slope: bool) -> int:
        """Bytes inside the pass over a tile: a block for the entropy's term, one for the softcap's derivative."""
        if by_triton(self.device, backend, self.dtype):
            return 0
        return block_bytes(self.device, self.chunk, self.columns, self.accumulator_itemsize) * (entropy_term + slope)

    def chunk_bytes(self, hidden: Tensor, *, masked: bool, sweep: int) -> int:
        """Bytes of a chunk: its copy of the hidden states (gathered, cast, or both), then `sweep`."""
        gathered, cast = masked or rows.flat_view(hidden) is None, hidden.dtype.itemsize != self.operand_itemsize
        copy = self.hidden_rows * self.operand_itemsize * (cast or gathered)
        return max(copy + self.hidden_rows * hidden.dtype.itemsize * (gathered and cast), copy + sweep)


def even_chunk(tokens: int, most: int) -> int:
    """Tokens of a chunk, if all tokens are split into the fewest equal chunks of at most `most`."""
    return math.ceil(tokens / math.ceil(tokens / most)) if tokens else 0


def block_bytes(device: torch.device, count: int, columns: int, itemsize: int) -> int:
    """Bytes of one elementwise block of `count` rows."""
    size = rows.CUDA_BLOCK_BYTES if device.type == "cuda" else rows.BLOCK_BYTES
    return min(count, max(1, size // (columns * itemsize))) * columns * itemsize


def by_triton(device: torch.device, backend: str, dtype: torch.dtype) -> bool:
    """Whether Triton runs the passes over tiles, which then allocate nothing. A GPU is assumed to have Triton."""
    if backend == "torch" or dtype == torch.float64:
        return False
    return device.type == "cuda" or (backend == "triton" and launch.unavailable_reason(device) is None)


def id_bytes(targets: Tensor, *, masked: bool) -> int:
    """Bytes of the valid tokens' indices and of their targets."""
    return targets.numel() * IDS * (2 if masked else int(targets.dtype != torch.int64))
