"""The online softmax in torch: one tile's pass, the statistics at the end, and the factors of the directions.

No digit of a small number passes through a large one: the target's column is left out of every sum, so that 1 - p_y is
a sum of its own and never 1 minus something, and the largest logit and the log of the sum stay a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Head
from .passes import blocks
from .state import MOMENT, OFF, RESCALE, SHIFT, SLOTS, SQUARE, TARGET

# The shift need not be the largest logit: e^30 is far from fp32's ends, and logits within 30 of it keep it. So ordinary
# logits keep a shift of 0, and cost no subtraction and no rescaling of sums.
LAZY = 30.0


class Wanted(NamedTuple):
    """What a pass is to sum besides the softmax, and whether its tile goes on into a product with the head."""

    moment: bool = False
    square: bool = False
    direction: bool = False


class Statistics(NamedTuple):
    """Per token, flat. `total` is sum_v e_v with the target's in it, `miss` is 1 - p_y."""

    shift: Tensor
    total: Tensor
    miss: Tensor
    slope: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None


def new_state(tokens: int, like: Tensor) -> Tensor:
    state = like.new_zeros(SLOTS, tokens)
    state[SHIFT] = state[TARGET] = float("-inf")
    return state


def exp_tile(
    z: Tensor, out: Tensor, spread: Tensor | None, y: Tensor, first: int, state: Tensor, head: Head, wanted: Wanted
) -> None:
    """Take the columns from `first` on into `state`, and leave e_v in `out`, e_v (z_v - shift) in `spread`.

    z: `[n, c]` products h @ W.T of one tile, overwritten. out: z itself, or `[n, c]` of another dtype. Both results are
    0 at the target and times the softcap's slope. head: with its bias and forbidden columns cut to the tile.
    """
    # The entropy and its gradient are differences of sums of e (z - shift): small terms if the shift is the maximum.
    # And fp16 ends at 65504, where e^30 does not.
    half = torch.float16 in (out.dtype, None if spread is None else spread.dtype)
    lazy = 0.0 if wanted.moment or half else LAZY
    for block in blocks(z.shape[0], z.shape[1], z.element_size(), z.device):
        part = None if spread is None else spread[block]
        _exp_block(z[block], part, y[block], first, state[:, block], head, wanted, lazy)
        if out is not z:
            out[block] = z[block]


def _exp_block(
    z: Tensor, spread: Tensor | None, y: Tensor, first: int, state: Tensor, head: Head, wanted: Wanted, lazy: float
) -> None:
    slope = torch.empty_like(z) if wanted.direction and head.softcap is not None else None
    head.transform_(z, slope)
    inside = ((y >= first) & (y < first + z.shape[1])).unsqueeze(1)
    column = (y - first).clamp(0, z.shape[1] - 1).unsqueeze(1)
    found = z.gather(1, column)
    state[TARGET] = torch.where(inside, found, state[TARGET].unsqueeze(1)).squeeze(1)
    z.scatter_(1, column, found.masked_fill(inside, float("-inf")))

    shift = _move_shift(torch.maximum(z.amax(1), state[TARGET]), state, lazy)
    if not shift.is_cpu or bool(shift.any()):
        z.sub_(shift.unsqueeze(1))
    held = None
    if wanted.moment:
        held = spread if spread is not None and spread.dtype == z.dtype else torch.empty_like(z)
        torch.clamp(z, min=torch.finfo(z.dtype).min, out=held)  # e = 0 at -inf: 0 times anything finite
    z.exp_()
    state[OFF] += z.sum(1)
    if wanted.square:
        state[SQUARE] += torch.linalg.vector_norm(z, dim=1).square_()
    if held is not None:
        state[MOMENT] += held.mul_(z).sum(1)
    if slope is not None:
        z.mul_(slope)
        if held is not None:
            held.mul_(slope)
    if spread is not None and held is not None and held is not spread:
        spread.copy_(held)


def _move_shift(top: Tensor, state: Tensor, lazy: float) -> Tensor:
    """The shift of this tile and of all before it, with the sums so far brought to it."""
    old = state[SHIFT].clone()
    first = torch.where(top.abs() <= lazy, 0.0, top)
    new = torch.where(old == float("-inf"), first, torch.where(top - old > lazy, top, old))
    moved = torch.where(old == float("-inf"), 0.0, old - new)
    rescale = moved.exp()
    if not moved.is_cpu or bool(moved.any()):
        # sum e (z - new) = rescale * (sum e (z - old) + (old - new) sum e)
        state[MOMENT] = rescale * (state[MOMENT] + moved * state[OFF])
        state[OFF] *= rescale
        state[SQUARE] *= rescale.square()
    state[SHIFT], state[RESCALE] = new, rescale
    return torch.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far: -inf minus 0, not minus -inf


def statistics(state: Tensor, head: Head, wanted: Wanted) -> Statistics:
    """What is known once every tile went through."""
    shift = state[SHIFT]
    at_target, off = state[TARGET] - shift, state[OFF]
    e = at_target.exp()
    total = e + off
    log_sum = total.log()
    logprobs = torch.where(e > off, -(off / e).log1p(), at_target - log_sum)
    miss = off / total
    entropy = lssp = None
    if wanted.moment:
        p = e / total
        # In this form each term is small where the entropy is: near p_y = 1 both are of the size of 1 - p_y.
        entropy = torch.where(p > 0, -p * logprobs, 0.0) + (off * log_sum - state[MOMENT]) / total
    if wanted.square:
        lssp = (state[SQUARE] + e.square()).log() - 2.0 * log_sum
    return Statistics(shift.clone(), total, miss, head.slope_at(state[TARGET]), logprobs, entropy, lssp)


class Factors(NamedTuple):
    """A gradient by the logits, as d = of_exp e + of_spread e (z - shift) off the target and at_target on it."""

    of_exp: Tensor
    of_spread: Tensor | None
    at_target: Tensor


def logprob_factors(of: Statistics, coefficient: Tensor | None = None) -> Factors:
    """dlogp/dz_v = onehot - p_v, times the coefficient of each token."""
    factors = Factors(-1.0 / of.total, None, of.miss * of.slope)
    return factors if coefficient is None else scaled(factors, coefficient.masked_fill(of.logprobs.isinf(), 0.0))


def entropy_factors(of: Statistics, coefficient: Tensor | None = None) -> Factors:
    """dH/dz_v = -p_v (log p_v + H), times the coefficient of each token."""
    assert of.entropy is not None
    p = of.logprobs.exp()
    at_target = torch.where(p > 0, -p * (of.logprobs + of.entropy), 0.0) * of.slope
    factors = Factors((of.total.log() - of.entropy) / of.total, -1.0 / of.total, at_target)
    return factors if coefficient is None else scaled(factors, coefficient)


def scaled(factors: Factors, by: Tensor) -> Factors:
    spread = None if factors.of_spread is None else factors.of_spread * by
    return Factors(factors.of_exp * by, spread, factors.at_target * by)


def added(a: Factors, b: Factors) -> Factors:
    spread = a.of_spread if b.of_spread is None else b.of_spread if a.of_spread is None else a.of_spread + b.of_spread
    return Factors(a.of_exp + b.of_exp, spread, a.at_target + b.at_target)
