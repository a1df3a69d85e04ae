"""PPO's losses on Triton as registered operators, for autograd and torch.compile.

triton is imported only when an operator runs: torch.compile traces the functions of this file, and cannot trace an
import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..double_backward import no_double_backward, no_forward_ad
from ..logprob.torch_rows import STATS
from ..records import Loss, result_dtype
from .options import (
    OPTIONS_SCHEMA,
    SUMS,
    VALUE_SUMS,
    PolicyOptions,
    PolicyTokens,
    divisor_arguments,
    dtype_of,
    metrics_of,
)

# loss, totals (all sums over the divisor), divisor; then the derivatives of the undivided loss, empty if not needed
RESULTS = "(Tensor loss, Tensor totals, Tensor divisor, Tensor slope, Tensor entropy_slope)"
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _kernels(module: str = ".triton") -> Any:
    return import_module(module, __package__)


@torch.library.custom_op(
    "onecard::ppo_loss",
    mutates_args=(),
    schema="(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor mask, Tensor? entropy,"
    " Tensor? ref_logprobs, Tensor? weights, Tensor? normalizer, float? number,"
    f" {OPTIONS_SCHEMA}, bool needs_slope, bool needs_entropy_slope) -> {RESULTS}",
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
    terms: Results = _kernels().policy_terms(
        logprobs,
        entropy,
        PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights),
        PolicyOptions(*options),
        normalizer=number if normalizer is None else normalizer,
        needs_slope=needs_slope,
        needs_entropy_slope=needs_entropy_slope,
    )
    return terms


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
    return _empty(logprobs, dtype, len(SUMS), *rest[-2:])


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
    divisor = number if normalizer is None else normalizer
    terms: Results = _kernels().value_terms(
        values, old_values, returns, mask, clip=clip, weights=weights, normalizer=divisor, needs_slope=needs_slope
    )
    return terms


@_value.register_fake
def _(
    values: Tensor, old_values: Tensor | None, returns: Tensor, mask: Tensor, weights: Tensor | None, *rest: Any
) -> Results:
    return _empty(values, dtype_of(values, old_values, returns, weights), len(VALUE_SUMS), rest[-1], False)


@torch.library.custom_op(
    "onecard::scale_gradients",
    mutates_args=(),
    schema="(Tensor grad, Tensor divisor, Tensor slope, Tensor entropy_slope, ScalarType dtype,"
    " ScalarType entropy_dtype) -> (Tensor, Tensor)",
)
def _scale(
    grad: Tensor, divisor: Tensor, slope: Tensor, entropy_slope: Tensor, dtype: torch.dtype, entropy_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scaled: tuple[Tensor, Tensor] = _kernels().scale(grad, divisor, slope, entropy_slope, dtype, entropy_dtype)
    return scaled


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
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


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
    return slope, None, None, None, entropy_slope, *[None] * (ctx.inputs - 5)


def _value_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad)[0], *[None] * (ctx.inputs - 1)


_policy.register_autograd(no_double_backward(_policy_backward), setup_context=_save_policy)
_value.register_autograd(no_double_backward(_value_backward), setup_context=_save_value)
no_forward_ad("ppo_loss", _policy, _scale)
no_forward_ad("value_loss", _value)


@torch.library.custom_op(
    "onecard::logits_ppo_forward",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, Tensor? old_logprobs, Tensor advantages, Tensor mask,"
    " Tensor? ref_logprobs, Tensor? weights, Tensor? normalizer, float? number, float temperature,"
    f" {OPTIONS_SCHEMA}) -> (Tensor loss, Tensor totals, Tensor divisor, Tensor stats, Tensor slope,"
    " Tensor entropy_slope)",
)
def _logits(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    normalizer: Tensor | None,
    number: float | None,
    temperature: float,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
    divisor = number if normalizer is None else normalizer
    checks.ids(targets, logits.shape[-1], mask)
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = _kernels(".triton_logits").forward(
        logits, targets, tokens, PolicyOptions(*options), temperature, divisor
    )
    return out


@_logits.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    normalizer: Tensor | None,
    number: float | None,
    temperature: float,
    *options: Any,
) -> tuple[Tensor, ...]:
    dtype = dtype_of(logits, old_logprobs, advantages, ref_logprobs, weights)
    count, entropy_in_loss = targets.numel(), PolicyOptions(*options).entropy_in_loss
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(len(SUMS), dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty(STATS, count, dtype=result_dtype(logits.dtype)),
        logits.new_empty(count, dtype=dtype),
        logits.new_empty(count if entropy_in_loss else 0, dtype=dtype),
    )


@torch.library.custom_op("onecard::logits_ppo_backward", mutates_args=())
def _logits_gradient(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    divisor: Tensor,
    stats: Tensor,
    slope: Tensor,
    entropy_slope: Tensor,
    grad: Tensor,
    temperature: float,
) -> Tensor:
    out: Tensor = _kernels(".triton_logits").backward(
        logits, targets, mask, divisor, stats, slope, entropy_slope, grad, temperature
    )
    return out


@_logits_gradient.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _, _, mask = inputs[:5]
    ctx.temperature, ctx.inputs = inputs[9], len(inputs)
    ctx.save_for_backward(logits, targets, mask, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _logits_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = None
    if grads[0] is not None:
        grad = torch.ops.onecard.logits_ppo_backward(*ctx.saved_tensors, grads[0], ctx.temperature)
    return grad, *(None,) * (ctx.inputs - 1)


_logits.register_autograd(no_double_backward(_logits_backward), setup_context=_save_logits)
no_forward_ad("logits_ppo_loss", _logits, _logits_gradient)


def _constant(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    normalizer: float | Tensor | None,
) -> Loss:
    with_grad = torch.is_grad_enabled()
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
        with_grad and logprobs.requires_grad,
        with_grad and entropy is not None and entropy.requires_grad,
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


def logits_ppo_loss(
    logits: Tensor,
    targets: Tensor,
    tokens: PolicyTokens,
    options: PolicyOptions,
    temperature: float,
    normalizer: float | Tensor | None,
) -> Loss:
    loss, totals, *_ = torch.ops.onecard.logits_ppo_forward(
        logits, targets, *tokens.detached(), *divisor_arguments(normalizer), temperature, *options
    )
    return Loss(loss, metrics_of(totals[1:], entropy=True, kl=tokens.ref_logprobs is not None))
