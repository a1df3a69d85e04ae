"""The linear path's one loop: products with the head over tiles of tokens by vocabulary, and an online softmax between.

With a frozen head the tile of e_v = exp(z_v - shift) that the pass leaves goes straight into the second product, and
the sums it gives, sum_v e_v W_v, need only each token's own factors to become dlogp/dh or dH/dh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch
from ..records import Head
from . import products
from .online import Factors, Statistics, Wanted, new_state, statistics
from .passes import blocks, result_dtype
from .plans import ALIGNED, Plan, columns_of
from .state import RESCALE


@dataclass(frozen=True)
class Linear:
    """The head, and how the products with it run."""

    weight: Tensor
    head: Head
    hidden_dtype: torch.dtype
    plan: Plan
    backend: str

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, statistics and sums."""
        return result_dtype(self.hidden_dtype, self.weight.dtype)

    @property
    def operand(self) -> torch.dtype:
        return products.operand_dtype(self.hidden_dtype, self.weight.dtype, self.dtype, self.weight.device)

    def at(self, y: Tensor) -> Tensor:
        """The head's rows of the targets. An id outside of it reads no wild address."""
        return self.weight.index_select(0, y.clamp(0, self.vocabulary - 1)).to(self.dtype)


class Workspace:
    """Memory for one tile, used again for every tile: products `z`, their `e` in the operands' dtype, and `spread`."""

    def __init__(self, linear: Linear, tokens: int, *, direction: bool, spread: bool) -> None:
        self.linear = linear
        self.rows = max(1, min(linear.plan.rows, tokens))
        self.columns = columns_of(linear.plan, linear.vocabulary, self.rows)
        self.whole = self.columns == linear.vocabulary  # one tile has all columns: e stays there after the sweep
        size = self.rows * _padded(self.columns)
        self._z = linear.weight.new_empty(size, dtype=linear.dtype)
        own = direction and linear.operand != linear.dtype
        self._e = linear.weight.new_empty(size, dtype=linear.operand) if own else self._z
        spread_dtype = linear.operand if direction else linear.dtype
        self._spread = linear.weight.new_empty(size, dtype=spread_dtype) if spread else None
        self._scratch = products.scratch_for(linear.weight, linear.operand, self.columns)
        backend = "torch" if linear.dtype == torch.float64 else linear.backend
        self._pass: Callable[..., None] = dispatch.implementation("linear_logprobs", backend, linear.weight.device)

    def z(self, n: int, c: int) -> Tensor:
        return _rows(self._z, n, c)

    def e(self, n: int, c: int) -> Tensor:
        return _rows(self._e, n, c)

    def spread(self, n: int, c: int) -> Tensor | None:
        return None if self._spread is None else _rows(self._spread, n, c)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the head."""
        for start in range(0, self.linear.vocabulary, self.columns):
            part = slice(start, min(start + self.columns, self.linear.vocabulary))
            yield part, self.linear.weight[part]

    def back(self, d: Tensor, tile: Tensor, total: Tensor | None) -> Tensor:
        return products.back(d, tile, total, self.linear.dtype, self._scratch)

    def exp(self, h: Tensor, part: slice, tile: Tensor, y: Tensor, state: Tensor, wanted: Wanted) -> None:
        """One tile: the product, and the pass over it."""
        n, c = h.shape[0], tile.shape[0]
        z = self.z(n, c)
        products.project(h, tile, z, self._scratch)
        head = self.linear.head.columns(part)
        self._pass(z, self.e(n, c), self.spread(n, c), y, part.start, state, head, wanted)


def _padded(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


def _rows(buffer: Tensor, n: int, c: int) -> Tensor:
    """`[n, c]` at the buffer's beginning, every row aligned: an odd vocabulary would else cost all wide loads."""
    return buffer[: n * _padded(c)].view(n, _padded(c))[:, :c]


@dataclass(frozen=True)
class Swept:
    """After all tiles: the statistics, and where they were asked for the sums over the head's rows, `[n, D]`."""

    of: Statistics
    of_exp: Tensor | None  # sum e_v W_v without the target
    of_spread: Tensor | None  # sum e_v (z_v - shift) W_v without the target


def sweep(space: Workspace, h: Tensor, y: Tensor, wanted: Wanted, *, sums: bool) -> Swept:
    """All of the vocabulary for the tokens h `[n, D]` (in the operands' dtype)."""
    n = h.shape[0]
    state = new_state(n, space.z(1, 1))
    of_exp = of_spread = None
    for part, tile in space.tiles():
        space.exp(h, part, tile, y, state, wanted)
        if not sums:
            continue
        c = tile.shape[0]
        if of_exp is not None:
            _rescale(of_exp, of_spread, state)
        of_exp = space.back(space.e(n, c), tile, of_exp)
        spread = space.spread(n, c)
        if spread is not None:
            of_spread = space.back(spread, tile, of_spread)
    return Swept(statistics(state, space.linear.head, wanted), of_exp, of_spread)


def gradient_by_hidden_(
    linear: Linear, of_exp: Tensor, of_spread: Tensor | None, factors: Factors, y: Tensor
) -> Tensor:
    """dL/dh `[n, D]` of dL/dz in the form of `factors`; in the memory of `of_spread` if it is used, or of `of_exp`."""
    if factors.of_spread is not None and of_spread is not None:
        total = of_spread.mul_(factors.of_spread.unsqueeze(1)).addcmul_(of_exp, factors.of_exp.unsqueeze(1))
    else:
        total = of_exp.mul_(factors.of_exp.unsqueeze(1))
    at_target = factors.at_target.unsqueeze(1)
    for rows in blocks(total.shape[0], total.shape[1], total.element_size()):
        total[rows].addcmul_(linear.at(y[rows]), at_target[rows])
    return total.mul_(linear.head.factor)


def _rescale(of_exp: Tensor, of_spread: Tensor | None, state: Tensor) -> None:
    """Bring the sums over earlier tiles to the shift of the last one."""
    rescale = state[RESCALE].unsqueeze(1)
    if rescale.is_cpu and bool((rescale == 1.0).all()):
        return
    if of_spread is not None:
        moved = torch.where(rescale > 0.0, rescale.log(), 0.0)
        of_spread.addcmul_(of_exp, moved).mul_(rescale)
    of_exp.mul_(rescale)
