"""linear_logprobs without autograd: the forward with its directions, and the backward of a head that is trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import launch
from . import products
from .online import Factors, Statistics, Wanted, added, entropy_factors, logprob_factors, new_state
from .passes import Rows
from .plans import TILED
from .state import SHIFT
from .tiles import Linear, Workspace, gradient_by_hidden_, sweep

SAVED = 6  # of each token, for a backward that forms the logits again: the fields of Statistics but the last


class Directions(NamedTuple):
    logprobs: bool
    entropy: bool


class Forward(NamedTuple):
    """Flat, of the valid tokens alone."""

    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    direction: Tensor | None  # dlogp/dh
    entropy_direction: Tensor | None  # dH/dh
    saved: Tensor  # [SAVED, tokens]


def forward(
    hidden: Tensor,
    y: Tensor,
    rows: Rows,
    linear: Linear,
    *,
    entropy: bool,
    sum_sq: bool,
    directions: Directions,
    keep: bool = False,
) -> Forward:
    """One product with the head for the statistics, one more for each direction. `keep`: a backward needs `saved`."""
    any_direction = directions.logprobs or directions.entropy
    if linear.plan.implementation == TILED and not (any_direction or keep) and _tiles_run(linear):
        return _tiled(hidden, y, rows, linear, entropy=entropy, sum_sq=sum_sq)
    wanted = Wanted(moment=entropy, square=sum_sq, direction=any_direction)
    space = Workspace(linear, rows.count, direction=any_direction, spread=directions.entropy)
    new = hidden.new_empty
    out = Forward(
        new(rows.count, dtype=linear.dtype),
        new(rows.count, dtype=linear.dtype) if entropy else None,
        new(rows.count, dtype=linear.dtype) if sum_sq else None,
        new(rows.count, hidden.shape[-1]) if directions.logprobs else None,
        new(rows.count, hidden.shape[-1]) if directions.entropy else None,
        new(SAVED, rows.count, dtype=linear.dtype),
    )
    for piece in rows.chunks(space.rows):
        h = rows.take(hidden, piece).to(linear.operand)
        swept = sweep(space, h, y[piece], wanted, sums=any_direction)
        of = swept.of
        _write(out, piece, of)
        # The entropy's first: each is formed over the sums that it is the last to need.
        for direction, factors_of in ((out.entropy_direction, entropy_factors), (out.direction, logprob_factors)):
            if direction is not None and swept.of_exp is not None:
                direction[piece] = gradient_by_hidden_(linear, swept.of_exp, swept.of_spread, factors_of(of), y[piece])
        del swept, of  # or they would live through the next sweep
    return out


def _write(out: Forward, piece: slice, of: Statistics) -> None:
    out.logprobs[piece] = of.logprobs
    for into, value in ((out.entropy, of.entropy), (out.log_sum_sq_probs, of.log_sum_sq_probs)):
        if into is not None and value is not None:
            into[piece] = value
    entropy = torch.zeros_like(of.total) if of.entropy is None else of.entropy
    out.saved[:, piece] = torch.stack([of.shift, of.total, of.miss, of.slope, of.logprobs, entropy])


def backward(
    hidden: Tensor,
    y: Tensor,
    rows: Rows,
    linear: Linear,
    saved: Tensor,
    on_logprobs: Tensor | None,
    on_entropy: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden (valid rows), and in fp32 by weight and bias; the logits formed again a tile at a time."""
    grads = Gradients(hidden, linear, rows, needed, hidden.dtype)
    # The direction is scaled by each token's coefficient in fp32 and rounded only then.
    space = Workspace(linear, rows.count, direction=False, spread=on_entropy is not None)
    state = new_state(rows.count, saved)
    state[SHIFT] = saved[0]  # the last shift of the forward: no tile moves it again
    wanted = Wanted(moment=on_entropy is not None, direction=True)
    for piece in rows.chunks(space.rows):
        h = rows.take(hidden, piece).to(linear.operand)
        shift, total, miss, slope, logprobs, entropy = saved[:, piece]
        of = Statistics(shift, total, miss, slope, logprobs, entropy, None)
        factors = _coefficients(of, _at(on_logprobs, piece), _at(on_entropy, piece))
        for part, tile in space.tiles():
            space.exp(h, part, tile, y[piece], state[:, piece].contiguous(), wanted)
            n, c = h.shape[0], tile.shape[0]
            d = derivative_(space.z(n, c), space.spread(n, c), factors, y[piece], part.start, linear.head.factor)
            grads.add(space, part, tile, d, h)
        grads.write(piece)
    return grads.result()


def _at(values: Tensor | None, piece: slice) -> Tensor | None:
    return None if values is None else values[piece]


def _coefficients(of: Statistics, on_logprobs: Tensor | None, on_entropy: Tensor | None) -> Factors:
    zero = torch.zeros_like(of.total)
    factors = Factors(zero, None, zero)
    if on_logprobs is not None:
        factors = added(factors, logprob_factors(of, on_logprobs))
    if on_entropy is not None:
        factors = added(factors, entropy_factors(of, on_entropy))
    return factors


def derivative_(e: Tensor, spread: Tensor | None, factors: Factors, y: Tensor, first: int, factor: float) -> Tensor:
    """dL/d(h @ W.T) of one tile, over `e [n, c]` (fp32 or fp64)."""
    e.mul_((factors.of_exp * factor).unsqueeze(1))
    if spread is not None and factors.of_spread is not None:
        e.addcmul_(spread, (factors.of_spread * factor).unsqueeze(1))
    inside = ((y >= first) & (y < first + e.shape[1])).unsqueeze(1)
    column = (y - first).clamp(0, e.shape[1] - 1).unsqueeze(1)
    at_target = (factors.at_target * factor).unsqueeze(1)
    return e.scatter_(1, column, torch.where(inside, at_target, e.gather(1, column)))


class Gradients:
    """Sums over tiles, in fp32; only those that are needed exist. Those by hidden are kept in `dtype`."""

    def __init__(
        self, hidden: Tensor, linear: Linear, rows: Rows, needed: tuple[bool, bool, bool], dtype: torch.dtype
    ) -> None:
        self.linear = linear
        new = hidden.new_zeros
        self.hidden = new(rows.count, hidden.shape[-1], dtype=dtype) if needed[0] else None
        self._of_piece: Tensor | None = None
        self.weight = new(linear.weight.shape, dtype=linear.dtype) if needed[1] else None
        self.bias = new(linear.vocabulary, dtype=linear.dtype) if needed[2] else None

    def add(self, space: Workspace, part: slice, tile: Tensor, d: Tensor, h: Tensor) -> None:
        """d: the loss's derivative by `h @ W.T` of one tile, in the accumulation dtype."""
        if self.bias is not None:
            self.bias[part] += d.sum(0)
        d = d.to(self.linear.operand)
        if self.hidden is not None:
            self._of_piece = space.back(d, tile, self._of_piece)
        if self.weight is not None:
            products.outer(d, h, self.weight[part])

    def write(self, piece: slice | Tensor, of_piece: Tensor | None = None) -> None:
        """Close a piece: all tiles were added, or `of_piece` is their sum."""
        of_piece, self._of_piece = (self._of_piece if of_piece is None else of_piece), None
        if self.hidden is not None and of_piece is not None:
            self.hidden[piece] = of_piece.to(self.hidden.dtype)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def _tiles_run(linear: Linear) -> bool:
    device = linear.weight.device
    if linear.backend == "torch" or linear.dtype != torch.float32 or launch.why_not(device) is not None:
        return False
    if linear.weight.dtype != linear.operand:  # it would be cast as a whole
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)  # below, its tiles spill


def _tiled(hidden: Tensor, y: Tensor, rows: Rows, linear: Linear, *, entropy: bool, sum_sq: bool) -> Forward:
    from .triton_tiled import tiled_statistics

    h = rows.take(hidden, slice(0, rows.count)).to(linear.operand)
    results = tiled_statistics(h, linear.weight, y, linear.head, entropy=entropy, sum_sq=sum_sq)
    return Forward(*results, None, None, hidden.new_empty(SAVED, 0, dtype=linear.dtype))
