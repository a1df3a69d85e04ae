"""linear_logprobs as registered operators: opaque to torch.compile, with shapes for it and gradients for autograd.

Outputs are flat, of all tokens (zeros where the mask is 0), so that shapes do not depend on the mask's values. What is
not asked for is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..once import no_forward_ad, once
from ..records import Head, LogProbs
from . import linear as raw
from .passes import Rows, blocks, result_dtype
from .plans import choose
from .tiles import Linear

FORWARD, FROZEN, TRAINED = "forward", "frozen", "trained"


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    head: Head,
    mask: Tensor | None,
    return_entropy: bool,
    entropy_requires_grad: bool,
    return_log_sum_sq_probs: bool,
    backend: str,
) -> LogProbs:
    logprobs, entropy, lssp, *_ = torch.ops.onecard.linear_logprobs(
        hidden,
        weight,
        targets,
        mask,
        *(head.bias, head.forbidden, head.temperature, head.logit_scale, head.softcap),
        return_entropy or entropy_requires_grad,
        entropy_requires_grad,
        return_log_sum_sq_probs,
        mode_of(hidden, weight, head),
        backend,
    )
    shape = targets.shape
    return LogProbs(
        # A view made here, not by the operator: one of an operator's own refuses `x.mul_()`.
        logprobs.view(shape),
        entropy.view(shape) if return_entropy or entropy_requires_grad else None,
        lssp.view(shape) if return_log_sum_sq_probs else None,
    )


def mode_of(hidden: Tensor, weight: Tensor, head: Head) -> str:
    """Which gradients autograd will ask for."""
    if not torch.is_grad_enabled():
        return FORWARD
    if weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        return TRAINED
    return FROZEN if hidden.requires_grad else FORWARD


def linear_of(
    hidden: Tensor,
    weight: Tensor,
    head: Head,
    backend: str,
    *,
    only: str | None = None,
) -> Linear:
    dtype = result_dtype(hidden.dtype, weight.dtype)
    plan = choose(weight.shape[0], dtype, hidden.device, only=only)
    return Linear(weight, head, hidden.dtype, plan, backend)


@torch.library.custom_op("onecard::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    entropy_grad: bool,
    sum_sq: bool,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        rows = Rows(targets.shape, mask)
        y = rows.pick(targets).long()
        checks.ids(y, weight.shape[0])
        linear = linear_of(hidden, weight, Head(bias, temperature, logit_scale, softcap, forbidden), backend)
        directions = raw.Directions(mode == FROZEN, mode == FROZEN and entropy_grad)
        kept = mode == TRAINED
        out = raw.forward(hidden, y, rows, linear, entropy=entropy, sum_sq=sum_sq, directions=directions, keep=kept)
        logprobs, h, lssp, *both = (
            hidden.new_empty(0, dtype=dtype) if x is None else rows.spread(x)
            for x, dtype in zip(out[:5], (*(linear.dtype,) * 3, *(hidden.dtype,) * 2), strict=True)
        )
        saved = rows.spread(out.saved.T).T.contiguous() if mode == TRAINED else logprobs.new_empty(0)
        return logprobs, h, lssp, both[0], both[1], saved


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    entropy, entropy_grad, sum_sq, mode = rest[6:10]
    dtype, tokens = result_dtype(hidden.dtype, weight.dtype), targets.numel()
    directions = (mode == FROZEN, mode == FROZEN and entropy_grad)
    return (
        *(hidden.new_empty(tokens if asked else 0, dtype=dtype) for asked in (True, entropy, sum_sq)),
        *(hidden.new_empty((tokens, hidden.shape[-1]) if asked else (0,)) for asked in directions),
        hidden.new_empty((raw.SAVED, tokens) if mode == TRAINED else (0,), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, mask, bias, forbidden, *ctx.numbers, _, entropy_grad, _, mode, ctx.backend = inputs
    logprobs, h, lssp, direction, entropy_direction, saved = output
    ctx.mode, ctx.entropy_grad, ctx.shape = mode, entropy_grad, hidden.shape
    detached = (lssp, direction, entropy_direction, saved)
    ctx.mark_non_differentiable(*detached, *(() if entropy_grad else (h,)))
    ctx.set_materialize_grads(False)
    if mode == TRAINED:
        ctx.save_for_backward(hidden, weight, targets, mask, bias, forbidden, saved)
    elif mode == FROZEN:
        # Not the output itself: whoever gets it may change it in place.
        ctx.save_for_backward(mask, logprobs.isfinite(), direction, entropy_direction)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    on_logprobs, on_entropy = grads[0], grads[1] if ctx.entropy_grad else None
    none = (None,) * 14
    if on_logprobs is None and on_entropy is None:
        return none
    if ctx.mode == FROZEN:
        grad = torch.ops.onecard.scale_directions(*ctx.saved_tensors, on_logprobs, on_entropy)
        return grad.view(ctx.shape), *none[1:]
    need = ctx.needs_input_grad
    hidden, weight, bias = torch.ops.onecard.linear_logprobs_backward(
        *ctx.saved_tensors, on_logprobs, on_entropy, *ctx.numbers, need[0], need[1], need[4], ctx.backend
    )
    return (
        hidden.view(ctx.shape) if need[0] else None,
        weight if need[1] else None,
        *(None, None),
        bias if need[4] else None,
        *none[5:],
    )


_forward.register_autograd(once(_backward), setup_context=_setup)


@torch.library.custom_op("onecard::scale_directions", mutates_args=())
def scale_directions(
    mask: Tensor | None,
    possible: Tensor,
    direction: Tensor,
    entropy_direction: Tensor,
    on_logprobs: Tensor | None,
    on_entropy: Tensor | None,
) -> Tensor:
    """dL/dh = dL/dlogp * dlogp/dh + dL/dH * dH/dh per token: all that is left for the backward of a frozen head."""
    valid = torch.ones_like(possible) if mask is None else mask.reshape(-1).bool()
    columns = []
    for source, on, counts in ((direction, on_logprobs, valid & possible), (entropy_direction, on_entropy, valid)):
        if on is not None:  # where a token does not count, its coefficient may be anything
            columns.append((source, torch.where(counts, on.reshape(-1), 0.0).unsqueeze(1)))
    grad = torch.empty_like(direction)
    for rows in blocks(grad.shape[0], grad.shape[1], 4, grad.device):  # products in fp32, rounded once
        torch.mul(columns[0][0][rows], columns[0][1][rows], out=grad[rows])
        if len(columns) == 2:
            grad[rows] = sum(source[rows] * column[rows] for source, column in columns)
    return grad


@scale_directions.register_fake
def _(mask: Any, possible: Tensor, direction: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(direction)


@torch.library.custom_op("onecard::linear_logprobs_backward", mutates_args=())
def _recompute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    saved: Tensor,
    on_logprobs: Tensor | None,
    on_entropy: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.still_there(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = Rows(targets.shape, mask)
        linear = linear_of(hidden, weight, Head(bias, temperature, logit_scale, softcap, forbidden), backend)
        by_hidden, by_weight, by_bias = raw.backward(
            hidden,
            rows.pick(targets).long(),
            rows,
            linear,
            saved if rows.index is None else saved[:, rows.index],
            None if on_logprobs is None else rows.pick(on_logprobs),
            None if on_entropy is None else rows.pick(on_entropy),
            (need_hidden, need_weight, need_bias),
        )
        return (
            hidden.new_empty(0) if by_hidden is None else rows.spread(by_hidden),
            hidden.new_empty(0) if by_weight is None else by_weight.to(weight.dtype),
            hidden.new_empty(0) if by_bias is None or bias is None else by_bias.to(bias.dtype),
        )


@_recompute.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    need_hidden, need_weight, need_bias = rest[-4:-1]
    return (
        hidden.new_empty((targets.numel(), hidden.shape[-1]) if need_hidden else (0,)),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )


no_forward_ad("linear_logprobs", _forward, scale_directions, _recompute)
