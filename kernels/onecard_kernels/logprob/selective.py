"""selective_log_softmax as registered operators, on either backend, and its torch implementation.

Only the logits themselves and five numbers of each row are saved. The backward takes each row's exponentials again:
that costs one pass, and saving the [tokens, V] softmax would cost as much memory as the logits.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..once import no_forward_ad, once
from ..records import LogProbs
from .passes import BLOCK_BYTES, Rows, result_dtype

SECOND_BACKWARD = (
    "a second backward through selective_log_softmax(inplace_backward=True): the first one wrote the gradient over the "
    "logits. Pass inplace_backward=False to go through the graph more than once."
)

# Each has `forward` and `backward`, with the signatures below. A backend's statistics are read by itself alone.
IMPLEMENTATIONS = {"torch": __name__, "triton": "onecard_kernels.logprob.triton_rows"}

FAR = -2000.0  # e^-2000 is 0 in fp64 too; a finite exponent, for 0 * -inf is NaN
STATS = 5  # per row: shift, sum of e^(z - shift), the same without the target's, logp, entropy


def selective_log_softmax(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    mask: Tensor | None,
    return_entropy: bool,
    entropy_requires_grad: bool,
    inplace_backward: bool,
    backend: str = "torch",
) -> LogProbs:
    entropy = return_entropy or entropy_requires_grad
    # The compiler plans memory itself, and an operator's gradient may not alias its inputs: there inplace_backward has
    # no effect.
    if inplace_backward and not torch.compiler.is_compiling():
        logprobs, h = _InPlace.apply(logits, targets, mask, temperature, entropy, backend)
    else:
        logprobs, h, _ = torch.ops.onecard.selective_forward(logits, targets, mask, temperature, entropy, backend)
    if not entropy:
        return LogProbs(logprobs, None, None)
    return LogProbs(logprobs, h if entropy_requires_grad else h.detach(), None)


def selective_log_softmax_triton(logits: Tensor, targets: Tensor, **options: Any) -> LogProbs:
    return selective_log_softmax(logits, targets, **options, backend="triton")


def _implementation(backend: str) -> Any:
    return sys.modules[__name__] if backend == "torch" else import_module(IMPLEMENTATIONS[backend])


@torch.library.custom_op("onecard::selective_forward", mutates_args=())
def _forward_op(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    checks.ids(targets, logits.shape[-1], mask)
    result: tuple[Tensor, Tensor, Tensor] = _implementation(backend).forward(
        logits, targets, mask, temperature, entropy
    )
    return result


@_forward_op.register_fake
def _(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(logits.dtype)
    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty(targets.shape if entropy else (0,), dtype=dtype),
        logits.new_empty(STATS, targets.numel(), dtype=dtype),
    )


@torch.library.custom_op("onecard::selective_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    on_logprobs: Tensor | None,
    on_entropy: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    result: Tensor = _implementation(backend).backward(
        logits, targets, mask, stats, on_logprobs, on_entropy, temperature
    )
    return result


@_backward_op.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, mask, ctx.temperature, ctx.entropy, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, mask, output[2])
    ctx.mark_non_differentiable(*output[2:] if ctx.entropy else output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    on_logprobs, on_entropy = grads[0], grads[1] if ctx.entropy else None
    if on_logprobs is None and on_entropy is None:
        return (None,) * 6
    grad = torch.ops.onecard.selective_backward(
        *ctx.saved_tensors, on_logprobs, on_entropy, ctx.temperature, ctx.backend
    )
    return grad, *(None,) * 5


_forward_op.register_autograd(once(_backward), setup_context=_setup)
no_forward_ad("selective_log_softmax", _forward_op, _backward_op)


class _InPlace(torch.autograd.Function):
    """The same with the gradient in the logits' storage."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        temperature: float,
        entropy: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        checks.ids(targets, logits.shape[-1], mask)
        ctx.temperature, ctx.entropy, ctx.backend, ctx.spent = temperature, entropy, backend, False
        logprobs, h, stats = _implementation(backend).forward(logits, targets, mask, temperature, entropy)
        ctx.save_for_backward(logits, targets, mask, stats)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(h)
        return logprobs, h

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(SECOND_BACKWARD)
        on_logprobs, on_entropy = grads[0], grads[1] if ctx.entropy else None
        if on_logprobs is None and on_entropy is None:
            return (None,) * 6
        ctx.spent = True
        logits, *saved = ctx.saved_tensors
        # A detached alias shares the logits' version counter: whoever else saved them gets an error, no wrong number.
        into = logits.detach()
        grad = _implementation(ctx.backend).backward(logits, *saved, on_logprobs, on_entropy, ctx.temperature, out=into)
        return grad, *(None,) * 5


def forward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of targets' shape (no entropies: empty), and the statistics for `backward`.

    No digit of a small number passes through a large one: the target's column is left out of the sums, so that 1 - p_y
    is one of its own, never 1 minus something; the largest logit and the log of the sum stay a pair.
    """
    rows, dtype = Rows(targets.shape, mask), result_dtype(logits.dtype)
    y = rows.pick(targets).long()
    stats = logits.new_zeros(STATS, rows.count, dtype=dtype)
    for piece in rows.chunks(_block_rows(logits, dtype)):
        z = _scaled(rows, logits, piece, temperature, dtype)
        column = y[piece].unsqueeze(1)
        at_target = z.gather(1, column)
        z.scatter_(1, column, float("-inf"))
        shift = torch.maximum(z.amax(1, keepdim=True), at_target)
        z.sub_(shift)
        d = z.clamp(min=FAR) if entropy else None
        off = z.exp_().sum(1)
        at_target = (at_target - shift).squeeze(1)
        e_target = at_target.exp()
        total = off + e_target
        log_sum = total.log()
        logp = torch.where(e_target > off, -(off / e_target).log1p(), at_target - log_sum)
        stats[:4, piece] = torch.stack([shift.squeeze(1), total, off, logp])
        if d is not None:
            # In this form each term is small where the entropy is: near p_y = 1 both are of the size of 1 - p_y.
            of_target = torch.where(e_target > 0, -e_target * logp, 0.0)
            stats[4, piece] = (of_target + off * log_sum - d.mul_(z).sum(1)) / total
    stats = rows.spread(stats.T).T.contiguous()
    # No views of `stats`: one that an autograd Function returns refuses `x.mul_()`.
    logprobs = stats.new_empty(targets.shape)
    logprobs.view(-1).copy_(stats[3])
    h = stats.new_empty(targets.shape if entropy else (0,))
    if entropy:
        h.view(-1).copy_(stats[4])
    return logprobs, h, stats


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    on_logprobs: Tensor | None,
    on_entropy: Tensor | None,
    temperature: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, into `out` (which may be the logits) or into new contiguous memory.

    d = on_logp (onehot - p) - on_H p (log p + H), over temperature; p = e / total and log p = z - shift - log total.
    """
    rows, dtype = Rows(targets.shape, mask), result_dtype(logits.dtype)
    y = rows.pick(targets).long()
    into = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    shift, total, off, logp, h = (rows.pick(row).unsqueeze(1) for row in stats)
    flat, at_target = torch.zeros_like(total), torch.zeros_like(total)
    steep = None
    if on_logprobs is not None:
        # a target of -inf is a constant
        on_logp = rows.pick(on_logprobs).unsqueeze(1).masked_fill(logp == float("-inf"), 0.0) / temperature
        flat, at_target = -on_logp / total, on_logp * (off / total)
    if on_entropy is not None:
        on_h = rows.pick(on_entropy).unsqueeze(1) / temperature
        flat, steep = flat + on_h * (total.log() - h) / total, -on_h / total
        at_target = at_target - on_h * torch.where(logp > float("-inf"), logp.exp() * (logp + h), 0.0)
    for piece in rows.chunks(_block_rows(logits, dtype)):
        z = _scaled(rows, logits, piece, temperature, dtype).sub_(shift[piece])
        if steep is None:
            z.exp_().mul_(flat[piece])
        else:
            d = z.clamp(min=FAR)
            z.exp_().mul_(d.mul_(steep[piece]).add_(flat[piece]))
        rows.put(into, piece, z.scatter_(1, y[piece].unsqueeze(1), at_target[piece]))
    if rows.index is not None:
        masked_out = torch.ones(rows.total, dtype=torch.bool, device=logits.device)
        masked_out[rows.index] = False
        into.masked_fill_(masked_out.view(*rows.shape, 1), 0.0)
    return into


def _block_rows(logits: Tensor, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (logits.shape[-1] * dtype.itemsize))


def _scaled(rows: Rows, logits: Tensor, piece: slice, temperature: float, dtype: torch.dtype) -> Tensor:
    """One block of logits / temperature, in a buffer of its own."""
    taken = rows.take(logits, piece)
    z = torch.empty_like(taken, dtype=dtype, memory_format=torch.contiguous_format).copy_(taken)
    return z if temperature == 1.0 else z.div_(temperature)
