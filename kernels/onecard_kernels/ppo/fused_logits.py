"""logits_ppo_loss on Triton as operators, which torch.compile takes as they are.

Nothing here imports triton: the operators do when they run, for a compiler that traces this file cannot import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..logprob.passes import result_dtype
from ..logprob.selective import STATS
from ..once import no_forward_ad, once
from ..records import Loss
from .options import PolicyOptions, PolicyTokens, divisor_arguments, dtype_of
from .terms import SUMS, metrics_of


def _kernels() -> Any:
    return import_module(".triton_logits", __package__)


@torch.library.custom_op("onecard::logits_ppo_forward", mutates_args=())
def _forward_op(
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
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
    options = PolicyOptions(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    divisor = number if normalizer is None else normalizer
    checks.ids(targets, logits.shape[-1], mask)
    return _kernels().forward(logits, targets, tokens, options, temperature, divisor)


@_forward_op.register_fake
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
def _backward_op(
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
    return _kernels().backward(logits, targets, mask, divisor, stats, slope, entropy_slope, grad, temperature)


@_backward_op.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _, _, mask = inputs[:5]
    ctx.temperature, ctx.inputs = inputs[9], len(inputs)
    ctx.save_for_backward(logits, targets, mask, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = None
    if grads[0] is not None:
        grad = torch.ops.onecard.logits_ppo_backward(*ctx.saved_tensors, grads[0], ctx.temperature)
    return grad, *(None,) * (ctx.inputs - 1)


_forward_op.register_autograd(once(_backward), setup_context=_setup)
no_forward_ad("logits_ppo_loss", _forward_op, _backward_op)


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
