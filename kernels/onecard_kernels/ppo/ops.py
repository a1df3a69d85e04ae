"""PPO's losses over the Triton kernels, as operators that autograd and torch.compile know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..once import no_forward_ad, once
from ..records import Loss
from .launches import POLICY_SUMS, VALUE_SUMS, finish, policy_tokens, scale, value_tokens
from .options import PolicyOptions, PolicyTokens, divisor_arguments, dtype_of
from .terms import metrics_of

# loss, totals (all sums over the divisor), divisor; then the derivatives of the summed loss, empty if not asked for
RESULTS = "(Tensor loss, Tensor totals, Tensor divisor, Tensor slope, Tensor entropy_slope)"
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "onecard::ppo_loss",
    mutates_args=(),
    schema="(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor mask, Tensor? entropy,"
    " Tensor? ref_logprobs, Tensor? weights, Tensor? normalizer, float? number, float clip_low, float clip_high,"
    " float? dual_clip, float entropy_coef, float kl_coef, str kl_estimator, bool needs_slope,"
    f" bool needs_entropy_slope) -> {RESULTS}",
)
def _policy(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    normalizer: Tensor | None,
    number: float | None,
    *rest: Any,
) -> Results:
    *options, needs_slope, needs_entropy_slope = rest
    terms = policy_tokens(
        logprobs,
        entropy,
        PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights),
        PolicyOptions(*options),
        needs_slope=needs_slope,
        needs_entropy_slope=needs_entropy_slope,
    )
    done = finish(terms.sums, number if normalizer is None else normalizer)
    return *done, terms.slope, terms.entropy_slope


@_policy.register_fake
def _(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    *rest: Any,
) -> Results:
    dtype = dtype_of(logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights)
    return _empty(logprobs, dtype, POLICY_SUMS, *rest[-2:])


@torch.library.custom_op(
    "onecard::value_loss",
    mutates_args=(),
    schema="(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, Tensor? weights, Tensor? normalizer,"
    f" float? number, float? clip, bool needs_slope) -> {RESULTS}",
)
def _value(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    normalizer: Tensor | None,
    number: float | None,
    clip: float | None,
    needs_slope: bool,
) -> Results:
    terms = value_tokens(values, old_values, returns, mask, clip=clip, weights=weights, needs_slope=needs_slope)
    done = finish(terms.sums, number if normalizer is None else normalizer)
    return *done, terms.slope, terms.entropy_slope


@_value.register_fake
def _(
    values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor, weights: Tensor | None, *rest: Any
) -> Results:
    return _empty(values, dtype_of(values, old_values, returns, weights), VALUE_SUMS, rest[-1], False)


@torch.library.custom_op(
    "onecard::scale_gradients",
    mutates_args=(),
    schema="(Tensor grad, Tensor divisor, Tensor slope, Tensor entropy_slope, ScalarType dtype,"
    " ScalarType entropy_dtype) -> (Tensor, Tensor)",
)
def _scale(
    grad: Tensor, divisor: Tensor, slope: Tensor, entropy_slope: Tensor, dtype: torch.dtype, entropy_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return scale(grad, divisor, slope, entropy_slope, dtype, entropy_dtype)


@_scale.register_fake
def _(
    grad: Tensor, divisor: Tensor, slope: Tensor, entropy_slope: Tensor, dtype: torch.dtype, entropy_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slope, dtype=dtype), torch.empty_like(entropy_slope, dtype=entropy_dtype)


def _empty(like: Tensor, dtype: torch.dtype, sums: int, needs_slope: bool, needs_entropy_slope: bool) -> Results:
    shapes = ((), (sums,), (), like.shape if needs_slope else (0,), like.shape if needs_entropy_slope else (0,))
    loss, totals, divisor, slope, entropy_slope = (like.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, totals, divisor, slope, entropy_slope


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, *constants = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(*constants[1:])
    ctx.dtype = inputs[0].dtype


def _save_policy(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _save(ctx, inputs, output)
    ctx.needs_slope, ctx.needs_entropy_slope = inputs[-2:]
    ctx.entropy_dtype = ctx.dtype if inputs[4] is None else inputs[4].dtype


def _save_value(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _save(ctx, inputs, output)
    ctx.needs_slope, ctx.needs_entropy_slope = inputs[-1], False
    ctx.entropy_dtype = ctx.dtype


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    slope, entropy_slope = _scale(grad, *ctx.saved_tensors, ctx.dtype, ctx.entropy_dtype)
    return slope if ctx.needs_slope else None, entropy_slope if ctx.needs_entropy_slope else None


def _policy_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    slope, entropy_slope = _gradients(ctx, grad)
    return slope, None, None, None, entropy_slope, *[None] * 12


def _value_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad)[0], *[None] * 8


_policy.register_autograd(once(_policy_backward), setup_context=_save_policy)
_value.register_autograd(once(_value_backward), setup_context=_save_value)
no_forward_ad("ppo_loss", _policy, _scale)
no_forward_ad("value_loss", _value)


def _constant(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    normalizer: float | Tensor | None,
) -> Loss:
    learns = torch.is_grad_enabled()
    entropy = entropy if options.entropy_in_loss else _constant(entropy)
    constants = tokens.detached()
    loss, totals, *_ = _policy(
        logprobs,
        constants.old_logprobs,
        constants.advantages,
        constants.mask,
        entropy,
        constants.ref_logprobs,
        constants.weights,
        *divisor_arguments(normalizer),
        *options,
        learns and logprobs.requires_grad,
        learns and entropy is not None and entropy.requires_grad,
    )
    return Loss(loss, metrics_of(totals[1:], entropy=entropy is not None, kl=tokens.ref_logprobs is not None))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> Loss:
    loss, totals, *_ = _value(
        values,
        _constant(old_values),
        returns.detach(),
        mask.detach(),
        _constant(weights),
        *divisor_arguments(normalizer),
        clip,
        torch.is_grad_enabled() and values.requires_grad,
    )
    return Loss(loss, {} if clip is None else {"val/clipfrac": totals[1]})
