"""selective_log_softmax in torch: row blocks in fp32, only the logits themselves are saved.

The backward takes each block's softmax again. That costs one pass, and saving its [tokens, V] result would cost as
much memory as the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..records import LogProbs
from .passes import BLOCK_BYTES, Rows, result_dtype, softmax_pass_

SECOND_BACKWARD = (
    "a second backward through selective_log_softmax(inplace_backward=True): the first one wrote the gradient over the "
    "logits. Pass inplace_backward=False to go through the graph more than once."
)


def selective_log_softmax(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    mask: Tensor | None,
    return_entropy: bool,
    entropy_requires_grad: bool,
    inplace_backward: bool,
) -> LogProbs:
    rows = Rows(targets.shape, mask)
    y = rows.pick(targets).long()
    entropy = return_entropy or entropy_requires_grad
    logprobs, h = _Selective.apply(logits, y, rows, temperature, entropy, entropy_requires_grad, inplace_backward)
    return LogProbs(rows.shaped(logprobs), rows.shaped(h), None)


def _block_rows(logits: Tensor, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (logits.shape[-1] * dtype.itemsize))


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        y: Tensor,
        rows: Rows,
        temperature: float,
        entropy: bool,
        entropy_grad: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = result_dtype(logits.dtype)
        logprobs = logits.new_empty(rows.count, dtype=dtype)
        h = torch.empty_like(logprobs) if entropy else None
        for piece in rows.chunks(_block_rows(logits, dtype)):
            z = _scaled(rows, logits, piece, temperature, dtype)
            stats = softmax_pass_(z, y[piece], entropy=entropy, sum_sq=False)
            logprobs[piece] = stats.logprobs
            if h is not None and stats.entropy is not None:
                h[piece] = stats.entropy
        ctx.save_for_backward(logits, y, logprobs == float("-inf"))
        ctx.rows, ctx.temperature, ctx.entropy_grad, ctx.inplace = rows, temperature, entropy_grad, inplace
        ctx.spent = False
        ctx.set_materialize_grads(False)
        full = None if h is None else rows.spread(h)
        if full is not None and not entropy_grad:
            ctx.mark_non_differentiable(full)
        return rows.spread(logprobs), full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(SECOND_BACKWARD)
        ctx.spent = ctx.inplace
        logits, y, impossible = ctx.saved_tensors
        rows: Rows = ctx.rows
        dtype = result_dtype(logits.dtype)
        on_logp = rows.coefficients(grads[0], impossible)
        on_entropy = rows.coefficients(grads[1]) if ctx.entropy_grad else None
        # A detached alias shares the logits' version counter: whoever else saved them gets an error, no wrong number.
        grad = logits.detach() if ctx.inplace else torch.zeros_like(logits)
        for piece in rows.chunks(_block_rows(logits, dtype)):
            z = _scaled(rows, logits, piece, ctx.temperature, dtype)
            spread = None if on_entropy is None else torch.empty_like(z)
            softmax_pass_(z, y[piece], entropy=spread is not None, sum_sq=False, spread=spread)
            z.mul_(on_logp[piece]) if on_logp is not None else z.zero_()
            if spread is not None and on_entropy is not None:
                z.addcmul_(spread, on_entropy[piece])
            rows.put(grad, piece, z.mul_(-1.0 / ctx.temperature))
        if ctx.inplace and rows.index is not None:
            masked_out = torch.ones(rows.total, dtype=torch.bool, device=logits.device)
            masked_out[rows.index] = False
            grad.masked_fill_(masked_out.view(*rows.shape, 1), 0.0)
        return grad, *(None,) * 6


def _scaled(rows: Rows, logits: Tensor, piece: slice, temperature: float, dtype: torch.dtype) -> Tensor:
    """One block of logits / temperature, in a buffer of its own."""
    taken = rows.take(logits, piece)
    z = torch.empty_like(taken, dtype=dtype, memory_format=torch.contiguous_format).copy_(taken)
    return z if temperature == 1.0 else z.div_(temperature)
