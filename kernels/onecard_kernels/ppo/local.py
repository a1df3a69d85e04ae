"""linear_ppo_loss in one sweep: a token's coefficient is known as soon as its log-probability is.

So the gradients are formed in the forward, from the same tile of logits, and the backward scales them. Two products
with the head; three with a trained one. Tokens without a coefficient cost one: those without advantage or weight in any
case, clipped ones where tiles have whole rows (chunked). There the entropy bonus needs no product of its own either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..logprob.linear import Gradients, derivative_
from ..logprob.online import Factors, Wanted, added, entropy_factors, logprob_factors
from ..logprob.passes import Rows, blocks
from ..logprob.tiles import Linear, Workspace, gradient_by_hidden_, sweep
from .options import PolicyOptions, PolicyTokens
from .terms import SUMS

# A row of logits is copied at the price of a fraction of its product; below this share of idle rows nothing is gained.
WORTH_SKIPPING = 1 / 8


class Result(NamedTuple):
    sums: Tensor  # in the order of SUMS
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward(
    hidden: Tensor,
    y: Tensor,
    rows: Rows,
    busy: int,
    linear: Linear,
    tokens: PolicyTokens,
    options: PolicyOptions,
    needed: tuple[bool, bool, bool],
) -> Result:
    """Sums over the tokens, and the gradients of the first of them that are needed, not divided by anything yet.

    tokens: the valid ones, flat. busy: the rows from this one on are known to have none.
    """
    trained = needed[1] or needed[2]
    wanted = Wanted(moment=True, direction=any(needed))
    # A trained head's derivative is summed over tokens in fp32; that of a frozen one is an operand of the product.
    direction = any(needed) and not trained
    space = Workspace(linear, rows.count, direction=direction, spread=any(needed) and options.entropy_in_loss)
    assert space.whole or not trained
    terms = dispatch.implementation("ppo_terms", linear.backend, hidden.device)
    grads = Gradients(hidden, linear, rows, needed, kept_dtype(hidden.dtype))
    total = None
    for piece in (*rows.chunks(space.rows, 0, busy), *rows.chunks(space.rows, busy)):
        h = rows.take(hidden, piece).to(linear.operand)
        learns = any(needed) and piece.start < busy
        swept = sweep(space, h, y[piece], wanted, sums=direction and learns and not space.whole)
        of = swept.of
        sums, on_logprobs, on_entropy = terms(of.logprobs, of.entropy, tokens.part(piece), options)
        total = sums if total is None else total + sums
        if not learns:
            continue
        factors = logprob_factors(of, on_logprobs.to(linear.dtype))
        idle = on_logprobs == 0.0
        if on_entropy is not None:
            factors = added(factors, entropy_factors(of, on_entropy.to(linear.dtype)))
            idle &= on_entropy == 0.0
        if not space.whole:
            assert swept.of_exp is not None
            grads.write(piece, gradient_by_hidden_(linear, swept.of_exp, swept.of_spread, factors, y[piece]))
        elif trained:
            _add_all(grads, piece, space, h, y[piece], factors)
        else:
            _add_busy(grads, piece, space, h.shape[0], y[piece], factors, ~idle)
    if total is None:
        total = hidden.new_zeros(len(SUMS), dtype=linear.dtype)
    return Result(total, *grads.result())


def kept_dtype(hidden: torch.dtype) -> torch.dtype:
    """Of the gradients by hidden until the backward scales them: what is not divided yet may be past fp16's range."""
    return torch.float32 if hidden == torch.float16 else hidden


def _add_all(grads: Gradients, piece: slice, space: Workspace, h: Tensor, y: Tensor, factors: Factors) -> None:
    n, linear = h.shape[0], space.linear
    d = derivative_(
        space.z(n, linear.vocabulary), space.spread(n, linear.vocabulary), factors, y, 0, linear.head.factor
    )
    for part, tile in space.tiles():  # one
        grads.add(space, part, tile, d, h)
    grads.write(piece)


def _add_busy(
    grads: Gradients, piece: slice, space: Workspace, n: int, y: Tensor, factors: Factors, busy: Tensor
) -> None:
    """The second product, of the tokens that have a coefficient. Their rows are moved up in the tile, in place."""
    linear, (e, spread) = space.linear, (space.e(n, space.columns), space.spread(n, space.columns))
    index = busy.nonzero().squeeze(1)
    if index.numel() == 0:
        return
    if index.numel() <= (1.0 - WORTH_SKIPPING) * n:
        for block in blocks(index.numel(), e.shape[1], e.element_size(), e.device):
            # index is ascending, and never below its own place: no row is overwritten before it was read.
            e[block] = e.index_select(0, index[block])
            if spread is not None:
                spread[block] = spread.index_select(0, index[block])
        of_spread = None if factors.of_spread is None else factors.of_spread[index]
        factors, y = Factors(factors.of_exp[index], of_spread, factors.at_target[index]), y[index]
        e, spread = e[: index.numel()], None if spread is None else spread[: index.numel()]
        into: slice | Tensor = index + piece.start
    else:
        into = piece
    if spread is not None and factors.of_spread is not None:
        # One product for both: the coefficients are known.
        for block in blocks(e.shape[0], e.shape[1], e.element_size(), e.device):
            both = e[block] * factors.of_exp[block].unsqueeze(1)
            e[block] = both.addcmul_(spread[block], factors.of_spread[block].unsqueeze(1))
        factors = factors._replace(of_exp=torch.ones_like(factors.of_exp), of_spread=None)
    for _, tile in space.tiles():  # one
        of_exp = space.back(e, tile, None)
        grads.write(into, gradient_by_hidden_(linear, of_exp, None, factors, y))
