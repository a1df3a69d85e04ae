"""The online softmax over tiles of the vocabulary: its state, the pass over one tile in torch, and the results.

No small number is computed as the difference of large ones. The target's column is left out of every sum, so that
1 - p_y is a sum and not 1 minus p_y. The shift and the log of the sum are stored separately.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Head
from .rows import blocks

# Slots of the online softmax's state, fp32 `[SLOTS, rows]`, in torch and in Triton. Sums leave the target's column out.
SHIFT = 0  # subtracted before exp, so that nothing overflows; -inf before the first tile
OFF = 1  # sum of exp(z - shift) over all but (off) the target
TARGET = 2  # z_y, -inf before the tile that has it
SLOPE = 3  # 1 - tanh^2 of the softcap at z_y, 1 without a softcap
MOMENT = 4  # sum of exp(z - shift) (z - shift)
SQUARE = 5  # sum of exp(2 (z - shift))
RESCALE = 6  # exp(old shift - new shift) of the last tile: the factor for sums that are not in the state
SLOTS = 8

# The shift need not be the largest logit, because e^30 is far below fp32's largest number. It moves only if a logit is
# more than 30 above it. So ordinary logits keep a shift of 0, without a subtraction and without rescaling of sums.
SHIFT_MARGIN = 30.0


class TileOutputs(NamedTuple):
    """What the pass over a tile computes besides the sum of exponentials."""

    moment: bool = False  # the sum for the entropy
    square: bool = False  # the sum of squares
    exponentials: bool = False  # write them, for a second product with the head


class Statistics(NamedTuple):
    """Per token, flat. `total`: sum_v exp(z_v - shift), with the target's; `one_minus_p`: 1 - p_y; `slope`: SLOPE."""

    shift: Tensor
    total: Tensor
    one_minus_p: Tensor
    slope: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None


def new_state(tokens: int, like: Tensor) -> Tensor:
    state = like.new_zeros(SLOTS, tokens)
    state[SHIFT] = state[TARGET] = float("-inf")
    return state


def exp_tile(
    z: Tensor,
    out: Tensor,
    entropy_term: Tensor | None,
    y: Tensor,
    first: int,
    state: Tensor,
    head: Head,
    outputs: TileOutputs,
) -> None:
    """Add the columns from `first` on to `state`; write e_v to `out` and e_v (z_v - shift) to `entropy_term`.

    Both results are 0 at the target, and times the softcap's slope.

    Args:
        z: `[n, c]`, products h @ W.T of one tile; overwritten.
        out: z itself, or `[n, c]` of another dtype.
        head: its bias and forbidden columns are those of the tile.
    """
    # The entropy and its gradient subtract sums of e (z - shift), whose terms are smallest if the shift is the maximum.
    # In fp16, whose largest number is 65504, e^30 would overflow.
    half = torch.float16 in (out.dtype, None if entropy_term is None else entropy_term.dtype)
    margin = 0.0 if outputs.moment or half else SHIFT_MARGIN
    for block in blocks(z.shape[0], z.shape[1], z.element_size(), z.device):
        part = None if entropy_term is None else entropy_term[block]
        _exp_block(z[block], part, y[block], first, state[:, block], head, outputs, margin)
        if out is not z:
            out[block] = z[block]


def _exp_block(
    z: Tensor,
    entropy_term: Tensor | None,
    y: Tensor,
    first: int,
    state: Tensor,
    head: Head,
    outputs: TileOutputs,
    margin: float,
) -> None:
    slope = torch.empty_like(z) if outputs.exponentials and head.softcap is not None else None
    head.transform_(z, slope)
    inside, column = _target_column(y, first, z)
    at_column = z.gather(1, column)
    state[TARGET] = torch.where(inside, at_column, state[TARGET].unsqueeze(1)).squeeze(1)
    z.scatter_(1, column, at_column.masked_fill(inside, float("-inf")))

    shift = _move_shift(torch.maximum(z.amax(1), state[TARGET]), state, margin)
    if not shift.is_cpu or bool(shift.any()):
        z.sub_(shift.unsqueeze(1))
    term = None
    if outputs.moment:
        term = entropy_term if entropy_term is not None and entropy_term.dtype == z.dtype else torch.empty_like(z)
        torch.clamp(z, min=torch.finfo(z.dtype).min, out=term)  # finite at z = -inf, where e is 0: 0 * -inf is NaN
    z.exp_()
    state[OFF] += z.sum(1)
    if outputs.square:
        state[SQUARE] += torch.linalg.vector_norm(z, dim=1).square_()
    if term is not None:
        state[MOMENT] += term.mul_(z).sum(1)
    if slope is not None:
        z.mul_(slope)
        if term is not None:
            term.mul_(slope)
    if entropy_term is not None and term is not None and term is not entropy_term:
        entropy_term.copy_(term)


def _move_shift(top: Tensor, state: Tensor, margin: float) -> Tensor:
    """The shift from this tile on; rescale the sums so far to it."""
    old = state[SHIFT].clone()
    first = torch.where(top.abs() <= margin, 0.0, top)
    new = torch.where(old == float("-inf"), first, torch.where(top - old > margin, top, old))
    moved = torch.where(old == float("-inf"), 0.0, old - new)
    rescale = moved.exp()
    if not moved.is_cpu or bool(moved.any()):
        # sum e (z - new) = rescale * (sum e (z - old) + (old - new) sum e)
        state[MOMENT] = rescale * (state[MOMENT] + moved * state[OFF])
        state[OFF] *= rescale
        state[SQUARE] *= rescale.square()
    state[SHIFT], state[RESCALE] = new, rescale
    return torch.where(new == float("-inf"), 0.0, new)  # only -inf so far: -inf - -inf would be NaN


def _target_column(y: Tensor, first: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row's target is in the tile, and its column there (any column where it is not), `[n, 1]` each."""
    inside = ((y >= first) & (y < first + tile.shape[1])).unsqueeze(1)
    return inside, (y - first).clamp(0, tile.shape[1] - 1).unsqueeze(1)


def rescale_sums_(exp_times_head: Tensor, term_times_head: Tensor | None, state: Tensor) -> None:
    """Rescale sums of e_v W_v and of e_v (z_v - shift) W_v over earlier tiles to the shift of the last tile."""
    rescale = state[RESCALE].unsqueeze(1)
    if rescale.is_cpu and bool((rescale == 1.0).all()):
        return
    if term_times_head is not None:
        moved = torch.where(rescale > 0.0, rescale.log(), 0.0)
        term_times_head.addcmul_(exp_times_head, moved).mul_(rescale)
    exp_times_head.mul_(rescale)


def statistics(state: Tensor, head: Head, outputs: TileOutputs) -> Statistics:
    """The results of each token, after all tiles."""
    shift = state[SHIFT]
    at_target, off = state[TARGET] - shift, state[OFF]
    e = at_target.exp()
    total = e + off
    log_sum = total.log()
    logprobs = torch.where(e > off, -(off / e).log1p(), at_target - log_sum)
    one_minus_p = off / total
    entropy = lssp = None
    if outputs.moment:
        p = e / total
        # Both terms are of the size of 1 - p_y near p_y = 1, as the entropy is.
        entropy = torch.where(p > 0, -p * logprobs, 0.0) + (off * log_sum - state[MOMENT]) / total
    if outputs.square:
        lssp = (state[SQUARE] + e.square()).log() - 2.0 * log_sum
    return Statistics(shift.clone(), total, one_minus_p, head.slope_at(state[TARGET]), logprobs, entropy, lssp)


class LogitGrad(NamedTuple):
    """Coefficients per token of a tile's dL/dz = exp_coef e + term_coef e (z - shift); target_coef at the target."""

    exp_coef: Tensor
    term_coef: Tensor | None
    target_coef: Tensor


def logprob_gradient(stats: Statistics, coefficient: Tensor | None = None) -> LogitGrad:
    """dlogp/dz_v = onehot - p_v, times the coefficient of each token."""
    logit_grad = LogitGrad(-1.0 / stats.total, None, stats.one_minus_p * stats.slope)
    if coefficient is None:
        return logit_grad
    return _scaled(logit_grad, coefficient.masked_fill(stats.logprobs.isinf(), 0.0))


def entropy_gradient(stats: Statistics, coefficient: Tensor | None = None) -> LogitGrad:
    """dH/dz_v = -p_v (log p_v + H), times the coefficient of each token."""
    assert stats.entropy is not None
    p = stats.logprobs.exp()
    at_target = torch.where(p > 0, -p * (stats.logprobs + stats.entropy), 0.0) * stats.slope
    logit_grad = LogitGrad((stats.total.log() - stats.entropy) / stats.total, -1.0 / stats.total, at_target)
    return logit_grad if coefficient is None else _scaled(logit_grad, coefficient)


def _scaled(logit_grad: LogitGrad, by: Tensor) -> LogitGrad:
    term_coef = None if logit_grad.term_coef is None else logit_grad.term_coef * by
    return LogitGrad(logit_grad.exp_coef * by, term_coef, logit_grad.target_coef * by)


def add_gradients(a: LogitGrad, b: LogitGrad) -> LogitGrad:
    term_coef = (
        a.term_coef if b.term_coef is None else b.term_coef if a.term_coef is None else a.term_coef + b.term_coef
    )
    return LogitGrad(a.exp_coef + b.exp_coef, term_coef, a.target_coef + b.target_coef)


def derivative_(
    e: Tensor, entropy_term: Tensor | None, logit_grad: LogitGrad, y: Tensor, first: int, factor: float
) -> Tensor:
    """dL/d(h @ W.T) of one tile, written over its exponentials `e [n, c]` (fp32 or fp64)."""
    e.mul_((logit_grad.exp_coef * factor).unsqueeze(1))
    if entropy_term is not None and logit_grad.term_coef is not None:
        e.addcmul_(entropy_term, (logit_grad.term_coef * factor).unsqueeze(1))
    inside, column = _target_column(y, first, e)
    at_target = (logit_grad.target_coef * factor).unsqueeze(1)
    return e.scatter_(1, column, torch.where(inside, at_target, e.gather(1, column)))
