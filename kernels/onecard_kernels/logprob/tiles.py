"""Products with the head over tiles of tokens by vocabulary, with an online softmax between them.

With a frozen head, the tile of e_v = exp(z_v - shift) goes straight into the second product. The sums over the
vocabulary, sum_v e_v W_v, then need only each token's own factors to become dlogp/dh or dH/dh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import dispatch
from ..records import Head, result_dtype
from . import matmul
from .online_softmax import Factors, Statistics, TileOutputs, new_state, rescale_sums_, statistics
from .rows import Rows, blocks
from .tuning import ALIGNED, TileSizes, columns_of


class HeadTiles:
    """The head in tiles, and memory for one tile, which every tile uses again.

    Args:
        tokens: how many there are; a tile has no more rows.
        direction: a second product takes the exponentials, in the operands' dtype.
        entropy_term: the pass also keeps e_v (z_v - shift), which the entropy's gradient needs.
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
        direction: bool,
        entropy_term: bool,
    ) -> None:
        self.weight, self.head, self.vocabulary = weight, head, weight.shape[0]
        self.dtype = result_dtype(hidden.dtype, weight.dtype)  # of logits, statistics and sums
        self.operand = matmul.operand_dtype(hidden.dtype, weight.dtype, self.dtype, weight.device)
        self.rows = max(1, min(sizes.rows, tokens))
        self.columns = columns_of(sizes, self.vocabulary, self.rows)
        self.whole = self.columns == self.vocabulary  # one tile has all columns
        size = self.rows * padded(self.columns)
        self._z = weight.new_empty(size, dtype=self.dtype)
        own = direction and self.operand != self.dtype
        self._e = weight.new_empty(size, dtype=self.operand) if own else self._z
        self._term = weight.new_empty(size, dtype=self.operand if direction else self.dtype) if entropy_term else None
        self.scratch = matmul.scratch_for(weight, self.operand, self.columns)
        backend = "torch" if self.dtype == torch.float64 else backend
        self.exp_tile: Callable[..., None] = dispatch.implementation("linear_logprobs", backend, weight.device)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary, and these rows of the head."""
        for start in range(0, self.vocabulary, self.columns):
            part = slice(start, min(start + self.columns, self.vocabulary))
            yield part, self.weight[part]

    def buffers(self, n: int, c: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Memory `[n, c]` for the products, for their exponentials (the same if the dtype is) and the entropy term.

        Every row is aligned: with an odd vocabulary all wide loads would be lost otherwise.
        """
        z, e, term = (
            None if x is None else x[: n * padded(c)].view(n, padded(c))[:, :c] for x in (self._z, self._e, self._term)
        )
        assert z is not None
        assert e is not None
        return z, e, term

    def sweep(
        self, h: Tensor, y: Tensor, outputs: TileOutputs, *, sums: bool
    ) -> tuple[Statistics, Tensor | None, Tensor | None]:
        """Take the tokens h `[n, D]` (in the operands' dtype) with targets y through all tiles.

        Returns:
            The statistics; with `sums` also sum_v e_v W_v and sum_v e_v (z_v - shift) W_v `[n, D]`, both without the
            target, the second one where there is an entropy term. With one tile, its buffers still hold the results.
        """
        state = new_state(h.shape[0], self._z)
        of_exp = of_term = None
        for part, tile in self.tiles():
            z, e, term = self.buffers(h.shape[0], tile.shape[0])
            matmul.project(h, tile, z, self.scratch)
            self.exp_tile(z, e, term, y, part.start, state, self.head.columns(part), outputs)
            if not sums:
                continue
            if of_exp is not None:
                rescale_sums_(of_exp, of_term, state)
            of_exp = matmul.back(e, tile, of_exp, self.dtype, self.scratch)
            if term is not None:
                of_term = matmul.back(term, tile, of_term, self.dtype, self.scratch)
        return statistics(state, self.head, outputs), of_exp, of_term

    def gradient_by_hidden_(self, of_exp: Tensor, of_term: Tensor | None, factors: Factors, y: Tensor) -> Tensor:
        """dL/dh `[n, D]` of dL/dz in the form of `factors`, in the memory of `of_term` if used, else of `of_exp`."""
        if factors.of_term is not None and of_term is not None:
            total = of_term.mul_(factors.of_term.unsqueeze(1)).addcmul_(of_exp, factors.of_exp.unsqueeze(1))
        else:
            total = of_exp.mul_(factors.of_exp.unsqueeze(1))
        at_target = factors.at_target.unsqueeze(1)
        for rows in blocks(total.shape[0], total.shape[1], total.element_size()):
            total[rows].addcmul_(self._head_rows(y[rows]), at_target[rows])
        return total.mul_(self.head.factor)

    def _head_rows(self, y: Tensor) -> Tensor:
        """The head's rows of the targets. An id outside of the vocabulary reads no wild address."""
        return self.weight.index_select(0, y.clamp(0, self.vocabulary - 1)).to(self.dtype)


def padded(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


class Gradients:
    """Sums over tiles by hidden, weight and bias; only those that are `needed` exist.

    Those by weight and bias are kept in the accumulation dtype, those by hidden in `dtype`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: Rows,
        needed: tuple[bool, bool, bool],
        accumulated: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        new = hidden.new_zeros
        self.hidden = new(rows.count, hidden.shape[-1], dtype=dtype) if needed[0] else None
        self._of_piece: Tensor | None = None
        self.weight = new(weight.shape, dtype=accumulated) if needed[1] else None
        self.bias = new(weight.shape[0], dtype=accumulated) if needed[2] else None

    def add(self, tiles: HeadTiles, part: slice, tile: Tensor, d: Tensor, h: Tensor) -> None:
        """d: the loss's derivative by `h @ W.T` of one tile, in the accumulation dtype."""
        if self.bias is not None:
            self.bias[part] += d.sum(0)
        d = d.to(tiles.operand)
        if self.hidden is not None:
            self._of_piece = matmul.back(d, tile, self._of_piece, tiles.dtype, tiles.scratch)
        if self.weight is not None:
            matmul.outer(d, h, self.weight[part])

    def write(self, piece: slice | Tensor, of_piece: Tensor | None = None) -> None:
        """Close a piece of the tokens: all tiles were added, or `of_piece` is their sum."""
        of_piece, self._of_piece = (self._of_piece if of_piece is None else of_piece), None
        if self.hidden is not None and of_piece is not None:
            self.hidden[piece] = of_piece.to(self.hidden.dtype)
