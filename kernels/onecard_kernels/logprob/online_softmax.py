"""The online softmax over tiles of the vocabulary: its state, the pass over one tile in torch, and the results.

No digit of a small number passes through a large one. The target's column is left out of every sum, so that 1 - p_y is
a sum of its own and never 1 minus something, and the largest logit and the log of the sum stay a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Head
from .rows import blocks

# Slots of the state of a softmax taken tile by tile, fp32 `[SLOTS, rows]`, shared by torch and Triton. Sums leave the
# target's column out.
SHIFT = 0  # subtracted before exp: near enough to the largest logit that nothing overflows, -inf at the start
OFF = 1  # sum of exp(z - shift)
TARGET = 2  # z_y, -inf until its tile has come
SLOPE = 3  # 1 - tanh^2 of the softcap at z_y, 1 without a softcap
MOMENT = 4  # sum of exp(z - shift) (z - shift)
SQUARE = 5  # sum of exp(2 (z - shift))
RESCALE = 6  # exp(old shift - new shift) of the last tile: the factor for sums that are kept elsewhere
SLOTS = 8

# The shift need not be the largest logit: e^30 is far from fp32's ends, and logits within 30 of it keep it. So ordinary
# logits keep a shift of 0, and cost no subtraction and no rescaling of sums.
LAZY = 30.0


class TileOutputs(NamedTuple):
    """What the pass over a tile is to compute besides the sum of exponentials."""

    moment: bool = False  # the sum for the entropy
    square: bool = False  # the sum of squares
    exponentials: bool = False  # write them, for a second product with the head


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
    # The entropy and its gradient are differences of sums of e (z - shift): small terms if the shift is the maximum.
    # And fp16 ends at 65504, where e^30 does not.
    half = torch.float16 in (out.dtype, None if entropy_term is None else entropy_term.dtype)
    lazy = 0.0 if outputs.moment or half else LAZY
    for block in blocks(z.shape[0], z.shape[1], z.element_size(), z.device):
        part = None if entropy_term is None else entropy_term[block]
        _exp_block(z[block], part, y[block], first, state[:, block], head, outputs, lazy)
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
    lazy: float,
) -> None:
    slope = torch.empty_like(z) if outputs.exponentials and head.softcap is not None else None
    head.transform_(z, slope)
    inside, column = _target_column(y, first, z)
    found = z.gather(1, column)
    state[TARGET] = torch.where(inside, found, state[TARGET].unsqueeze(1)).squeeze(1)
    z.scatter_(1, column, found.masked_fill(inside, float("-inf")))

    shift = _move_shift(torch.maximum(z.amax(1), state[TARGET]), state, lazy)
    if not shift.is_cpu or bool(shift.any()):
        z.sub_(shift.unsqueeze(1))
    term = None
    if outputs.moment:
        term = entropy_term if entropy_term is not None and entropy_term.dtype == z.dtype else torch.empty_like(z)
        torch.clamp(z, min=torch.finfo(z.dtype).min, out=term)  # e = 0 at -inf: 0 times anything finite
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


def _move_shift(top: Tensor, state: Tensor, lazy: float) -> Tensor:
    """The shift of this tile and of all before it; the sums so far are brought to it."""
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


def _target_column(y: Tensor, first: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row's target is in the tile, and its column there (any column where it is not), `[n, 1]` each."""
    inside = ((y >= first) & (y < first + tile.shape[1])).unsqueeze(1)
    return inside, (y - first).clamp(0, tile.shape[1] - 1).unsqueeze(1)


def rescale_sums_(sum_exp: Tensor, sum_term: Tensor | None, state: Tensor) -> None:
    """Bring sums of e_v W_v and of e_v (z_v - shift) W_v over earlier tiles to the shift of the last tile."""
    rescale = state[RESCALE].unsqueeze(1)
    if rescale.is_cpu and bool((rescale == 1.0).all()):
        return
    if sum_term is not None:
        moved = torch.where(rescale > 0.0, rescale.log(), 0.0)
        sum_term.addcmul_(sum_exp, moved).mul_(rescale)
    sum_exp.mul_(rescale)


def statistics(state: Tensor, head: Head, outputs: TileOutputs) -> Statistics:
    """The results of each token, after all tiles."""
    shift = state[SHIFT]
    at_target, off = state[TARGET] - shift, state[OFF]
    e = at_target.exp()
    total = e + off
    log_sum = total.log()
    logprobs = torch.where(e > off, -(off / e).log1p(), at_target - log_sum)
    miss = off / total
    entropy = lssp = None
    if outputs.moment:
        p = e / total
        # In this form each term is small where the entropy is: near p_y = 1 both are of the size of 1 - p_y.
        entropy = torch.where(p > 0, -p * logprobs, 0.0) + (off * log_sum - state[MOMENT]) / total
    if outputs.square:
        lssp = (state[SQUARE] + e.square()).log() - 2.0 * log_sum
    return Statistics(shift.clone(), total, miss, head.slope_at(state[TARGET]), logprobs, entropy, lssp)


class LogitGrad(NamedTuple):
    """dL/dz of a tile from numbers per token: exp_coef e + term_coef e (z - shift); target_coef at the target."""

    exp_coef: Tensor
    term_coef: Tensor | None
    target_coef: Tensor


def logprob_gradient(of: Statistics, coefficient: Tensor | None = None) -> LogitGrad:
    """dlogp/dz_v = onehot - p_v, times the coefficient of each token."""
    logit_grad = LogitGrad(-1.0 / of.total, None, of.miss * of.slope)
    return logit_grad if coefficient is None else _scaled(logit_grad, coefficient.masked_fill(of.logprobs.isinf(), 0.0))


def entropy_gradient(of: Statistics, coefficient: Tensor | None = None) -> LogitGrad:
    """dH/dz_v = -p_v (log p_v + H), times the coefficient of each token."""
    assert of.entropy is not None
    p = of.logprobs.exp()
    at_target = torch.where(p > 0, -p * (of.logprobs + of.entropy), 0.0) * of.slope
    logit_grad = LogitGrad((of.total.log() - of.entropy) / of.total, -1.0 / of.total, at_target)
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
    """dL/d(h @ W.T) of one tile, in the memory of its exponentials `e [n, c]` (fp32 or fp64)."""
    e.mul_((logit_grad.exp_coef * factor).unsqueeze(1))
    if entropy_term is not None and logit_grad.term_coef is not None:
        e.addcmul_(entropy_term, (logit_grad.term_coef * factor).unsqueeze(1))
    inside, column = _target_column(y, first, e)
    at_target = (logit_grad.target_coef * factor).unsqueeze(1)
    return e.scatter_(1, column, torch.where(inside, at_target, e.gather(1, column)))
