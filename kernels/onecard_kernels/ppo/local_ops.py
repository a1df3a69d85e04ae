"""linear_ppo_loss's sweep as registered operators. What is not asked for is an empty tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..logprob.ops import linear_of
from ..logprob.passes import Rows, result_dtype
from ..logprob.plans import CHUNKED
from ..once import once
from ..records import Head
from . import local
from .terms import SUMS


@torch.library.custom_op("onecard::linear_ppo", mutates_args=())
def linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        rows, busy = _busy_first(Rows(targets.shape, mask), advantages, weights, kl_coef != 0.0 or entropy_coef != 0.0)
        given = (old_logprobs, advantages, ref_logprobs, weights)
        ref, factors = (None if x is None else rows.pick(x) for x in (ref_logprobs, weights))
        tokens = local.Tokens(rows.pick(old_logprobs), rows.pick(advantages), ref, factors)
        head = Head(bias, temperature, logit_scale, softcap, forbidden)
        # A trained head's product needs each token's coefficient, and that is known where the rows are whole.
        linear = linear_of(hidden, weight, head, backend, only=CHUNKED if needs[1] or needs[2] else None)
        options = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "dual_clip": dual_clip,
            "entropy_coef": entropy_coef,
            "kl_coef": kl_coef,
            "kl_estimator": kl_estimator,
        }
        needed = (needs[0], needs[1], needs[2])
        out = local.forward(hidden, rows.pick(targets).long(), rows, busy, linear, tokens, options, needed)
        dtype = _dtype(hidden, weight, given)
        by_hidden = None if out.hidden is None else rows.spread(out.hidden)
        by_hidden, by_weight, by_bias = (
            hidden.new_empty(0) if x is None else x for x in (by_hidden, out.weight, out.bias)
        )
        return out.sums[0].to(dtype, copy=True), out.sums[1:].to(dtype, copy=True), by_hidden, by_weight, by_bias


def _busy_first(rows: Rows, advantages: Tensor, weights: Tensor | None, other_terms: bool) -> tuple[Rows, int]:
    """Rows whose loss can have a gradient, before those with no advantage or no weight (and how many they are)."""
    busy = torch.ones_like(rows.pick(advantages), dtype=torch.bool) if other_terms else rows.pick(advantages) != 0.0
    if weights is not None:
        busy &= rows.pick(weights) != 0.0
    return (rows, rows.count) if bool(busy.all()) else rows.first(busy)


def _dtype(hidden: Tensor, weight: Tensor, given: tuple[Tensor | None, ...]) -> torch.dtype:
    return result_dtype(hidden.dtype, weight.dtype, *(x.dtype for x in given if x is not None))


@linear_ppo.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-2]
    dtype = _dtype(hidden, weight, (old_logprobs, advantages, ref_logprobs, weights))
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(SUMS) - 1, dtype=dtype),
        hidden.new_empty((targets.numel(), hidden.shape[-1]), dtype=local.kept_dtype(hidden.dtype))
        if needs[0]
        else hidden.new_empty(0),
        *(
            hidden.new_empty(x.shape, dtype=result_dtype(hidden.dtype, weight.dtype))
            if needed and x is not None
            else hidden.new_empty(0)
            for x, needed in zip((weight, bias), needs[1:], strict=True)
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[0], inputs[1], inputs[8]
    ctx.shape, ctx.needs = hidden.shape, inputs[-2]
    ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 21
    if grad is None:
        return none
    by_hidden, by_weight, by_bias = torch.ops.onecard.scale_linear_ppo(*ctx.saved_tensors, grad, *ctx.dtypes)
    return (
        by_hidden.view(ctx.shape) if ctx.needs[0] else None,
        by_weight if ctx.needs[1] else None,
        *none[2:8],
        by_bias if ctx.needs[2] else None,
        *none[9:],
    )


linear_ppo.register_autograd(once(_backward), setup_context=_setup)


@torch.library.custom_op("onecard::scale_linear_ppo", mutates_args=())
def scale_linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    by: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each times the 0-d `by`, then rounded: all that is left for the backward."""
    hidden, weight, bias = (
        torch.mul(x, by, out=torch.empty_like(x, dtype=dtype))
        for x, dtype in ((hidden, hidden_dtype), (weight, weight_dtype), (bias, bias_dtype))
    )
    return hidden, weight, bias


@scale_linear_ppo.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, by: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, dtype=dtype) for x, dtype in zip((hidden, weight, bias), dtypes, strict=True))
