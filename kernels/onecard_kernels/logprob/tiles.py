"""Matrix products with the head, tile by tile (tokens x vocabulary), with an online softmax over the tiles.

With a frozen head, e_v = exp(z_v - shift) of a tile is multiplied with the head at once. dlogp/dh and dH/dh are then
sum_v e_v W_v times one factor per token, plus the target's row of the head times another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..records import Head, result_dtype
from . import matmul
from .online_softmax import LogitGrad, Statistics, TileOutputs, new_state, rescale_sums_, statistics
from .rows import Rows, blocks
from .tuning import ALIGNED, TileSizes, columns_of


class HeadTiles:
    """The head cut into tiles, and one set of buffers, which every tile overwrites.

    Args:
        tokens: the number of tokens, which is the most rows that a tile can have.
        exp_operand: store the exponentials in the operands' dtype, for a second product.
        entropy_term: also store e_v (z_v - shift), for the gradient of the entropy.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        tokens: int,
        sizes: TileSizes,
        backend: str,
        *,
        exp_operand: bool,
        entropy_term: bool,
    ) -> None:
        self.weight, self.head, self.vocabulary = weight, head, weight.shape[0]
        self.dtype = result_dtype(hidden.dtype, weight.dtype)  # of logits, statistics and accumulated sums
        self.operand = matmul.operand_dtype(hidden.dtype, weight.dtype, self.dtype, weight.device)
        self.rows = max(1, min(sizes.rows, tokens))
        self.columns = columns_of(sizes, self.vocabulary, self.rows)
        self.has_whole_rows = self.columns == self.vocabulary  # one tile has all columns
        size = self.rows * padded(self.columns)
        self._z = weight.new_empty(size, dtype=self.dtype)
        separate = exp_operand and self.operand != self.dtype
        self._e = weight.new_empty(size, dtype=self.operand) if separate else self._z
        self._term = weight.new_empty(size, dtype=self.operand if exp_operand else self.dtype) if entropy_term else None
        self.scratch = matmul.scratch_for(weight, self.operand, self.columns)
        backend = "torch" if self.dtype == torch.float64 else backend
        self.exp_tile: Callable[..., None] = dispatch.implementation("linear_logprobs", backend, weight.device)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the vocabulary, and these rows of the head."""
        for start in range(0, self.vocabulary, self.columns):
            part = slice(start, min(start + self.columns, self.vocabulary))
            yield part, self.weight[part]

    def buffers(self, n: int, c: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Buffers `[n, c]` for the logits, for their exponentials (the same one if the dtype is) and the entropy term.

        Each row is padded to a multiple of ALIGNED, so that wide loads work with a vocabulary of any size.
        """
        z, e, term = (
            None if x is None else x[: n * padded(c)].view(n, padded(c))[:, :c] for x in (self._z, self._e, self._term)
        )
        assert z is not None
        assert e is not None
        return z, e, term

    def sweep(
        self, h: Tensor, y: Tensor, outputs: TileOutputs, *, second_product: bool
    ) -> tuple[Statistics, Tensor | None, Tensor | None]:
        """Multiply hidden states h `[n, D]` (in the operands' dtype) with every tile, for the softmax at targets y.

        Returns:
            The statistics; with `second_product` also sum_v e_v W_v and, with an entropy term, sum_v e_v (z_v - shift)
            W_v, both `[n, D]` and without the target. The buffers hold the last tile's results.
        """
        state = new_state(h.shape[0], self._z)
        exp_times_head = term_times_head = None
        for part, tile in self.tiles():
            z, e, term = self.buffers(h.shape[0], tile.shape[0])
            matmul.project(h, tile, z, self.scratch)
            self.exp_tile(z, e, term, y, part.start, state, self.head.columns(part), outputs)
            if not second_product:
                continue
            if exp_times_head is not None:
                rescale_sums_(exp_times_head, term_times_head, state)
            exp_times_head = matmul.project_back(e, tile, exp_times_head, self.dtype, self.scratch)
            if term is not None:
                term_times_head = matmul.project_back(term, tile, term_times_head, self.dtype, self.scratch)
        return statistics(state, self.head, outputs), exp_times_head, term_times_head

    def hidden_grad_(
        self, exp_times_head: Tensor, term_times_head: Tensor | None, logit_grad: LogitGrad, y: Tensor
    ) -> Tensor:
        """dL/dh `[n, D]` from dL/dz as `logit_grad`. Overwrites `term_times_head` if used, else `exp_times_head`."""
        if logit_grad.term_coef is not None and term_times_head is not None:
            total = term_times_head.mul_(logit_grad.term_coef.unsqueeze(1)).addcmul_(
                exp_times_head, logit_grad.exp_coef.unsqueeze(1)
            )
        else:
            total = exp_times_head.mul_(logit_grad.exp_coef.unsqueeze(1))
        at_target, last = logit_grad.target_coef.unsqueeze(1), self.vocabulary - 1
        for rows in blocks(total.shape[0], total.shape[1], total.element_size()):
            # clamped, so that no id reads out of bounds
            total[rows].addcmul_(self.weight.index_select(0, y[rows].clamp(0, last)).to(self.dtype), at_target[rows])
        return total.mul_(self.head.factor)


def padded(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


class Gradients:
    """Gradients of hidden, weight and bias, summed over tiles; None where not `needed`.

    `accumulated`: the dtype of the gradients of weight and bias. `dtype`: that of the hidden gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: Rows,
        needed: Sequence[bool],
        accumulated: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        new = hidden.new_zeros
        self.hidden = new(rows.count, hidden.shape[-1], dtype=dtype) if needed[0] else None
        self._piece_sum: Tensor | None = None
        self.weight = new(weight.shape, dtype=accumulated) if needed[1] else None
        self.bias = new(weight.shape[0], dtype=accumulated) if needed[2] else None

    def add(self, tiles: HeadTiles, part: slice, tile: Tensor, d: Tensor, h: Tensor) -> None:
        """Add one tile's part. d: dL/d(h @ W.T) of the tile, in the dtype of accumulation."""
        if self.bias is not None:
            self.bias[part] += d.sum(0)
        d = d.to(tiles.operand)
        if self.hidden is not None:
            self._piece_sum = matmul.project_back(d, tile, self._piece_sum, tiles.dtype, tiles.scratch)
        if self.weight is not None:
            matmul.outer(d, h, self.weight[part])

    def write(self, piece: slice | Tensor, piece_grad: Tensor | None = None) -> None:
        """Write the hidden gradient of tokens `piece`: `piece_grad`, or the sum over the tiles that were added."""
        piece_grad, self._piece_sum = (self._piece_sum if piece_grad is None else piece_grad), None
        if self.hidden is not None and piece_grad is not None:
            self.hidden[piece] = piece_grad.to(self.hidden.dtype)
