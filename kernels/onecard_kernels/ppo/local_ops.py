"""linear_ppo_loss's sweep as registered operators. What is not asked for is an empty tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..logprob.ops import linear_of
from ..logprob.passes import Rows, result_dtype
from ..logprob.plans import CHUNKED
from ..once import no_forward_ad, once
from ..records import Head
from . import local
from .options import PolicyOptions, PolicyTokens, dtype_of
from .terms import SUMS


@torch.library.custom_op("onecard::linear_ppo", mutates_args=())
def linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
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
        tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
        options = PolicyOptions(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
        rows, busy = _busy_first(Rows(targets.shape, mask), tokens, options)
        head = Head(bias, temperature, logit_scale, softcap, forbidden)
        # A trained head's product needs each token's coefficient, and that is known where the rows are whole.
        linear = linear_of(hidden, weight, head, backend, only=CHUNKED if needs[1] or needs[2] else None)
        needed = (needs[0], needs[1], needs[2])
        y = rows.pick(targets).long()
        checks.ids(y, weight.shape[0])
        out = local.forward(hidden, y, rows, busy, linear, tokens.picked(rows), options, needed)
        dtype = tokens.dtype_with(hidden, weight)
        by_hidden = None if out.hidden is None else rows.spread(out.hidden)
        by_hidden, by_weight, by_bias = (
            hidden.new_empty(0) if x is None else x for x in (by_hidden, out.weight, out.bias)
        )
        return out.sums[0].to(dtype, copy=True), out.sums[1:].to(dtype, copy=True), by_hidden, by_weight, by_bias


def _busy_first(rows: Rows, tokens: PolicyTokens, options: PolicyOptions) -> tuple[Rows, int]:
    """Rows whose loss can have a gradient, before those with no advantage or no weight (and how many they are)."""
    busy = rows.pick(tokens.advantages) != 0.0
    if options.kl_in_loss or options.entropy_in_loss:
        busy = torch.ones_like(busy)
    if tokens.weights is not None:
        busy &= rows.pick(tokens.weights) != 0.0
    return (rows, rows.count) if bool(busy.all()) else rows.first(busy)


@linear_ppo.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-2]
    dtype = dtype_of(hidden, weight, old_logprobs, advantages, ref_logprobs, weights)
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
    # A parameter, to see whether it is still there; a weight that was computed is not held for that.
    ctx.weight = weight if ctx.needs[1] and weight.is_leaf else None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 21
    if grad is None:
        return none
    if ctx.weight is not None:
        checks.still_there(ctx.weight)
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


no_forward_ad("linear_ppo_loss", linear_ppo, scale_linear_ppo)


def sums_of(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: Head,
    tokens: PolicyTokens,
    options: PolicyOptions,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The summed loss, with its gradient, and the other sums in the order of SUMS, without."""
    learns = torch.is_grad_enabled()
    loss, sums, *_ = linear_ppo(
        *(hidden, weight, targets, *tokens.detached()),
        *(head.bias, head.forbidden, head.temperature, head.logit_scale, head.softcap),
        *options,
        [learns and x is not None and x.requires_grad for x in (hidden, weight, head.bias)],
        backend,
    )
    return loss, sums.detach()
