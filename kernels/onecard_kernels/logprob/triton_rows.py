"""selective_log_softmax in Triton: forward and gradient over rows of logits, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import result_dtype
from .torch_rows import STATS
from .triton_row_parts import (
    ENTROPY,
    FAR,
    LN2,
    LOG2E,
    LOGPROB,
    OFF,
    SHIFT,
    TOTAL,
    MaxBlock,
    RowStrides,
    accumulator,
    checked_target,
    per_row,
    row_address,
    row_statistics,
    row_strides,
    store_statistics,
    strided_rows,
)

FORWARD = BACKWARD = MaxBlock()


# Scalars are annotated fp64: an unannotated Python float would be fp32, too coarse for fp64 logits.
@triton.jit
def _forward_kernel(
    logits_ptr,
    target_ptr,
    mask_ptr,
    logprob_ptr,
    entropy_ptr,
    stats_ptr,
    rows,
    columns,
    inner,
    outer_stride,
    inner_stride,
    log2e_over_temperature: tl.float64,
    MASKED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    valid = True
    if MASKED:
        valid = tl.load(mask_ptr + row) != 0
    if valid:
        factor = tl.full((), log2e_over_temperature, DTYPE)
        row_ptr = logits_ptr + row_address(row, inner, outer_stride, inner_stride)
        target = checked_target(target_ptr, row, columns)
        shift, total, off, logprob, entropy = row_statistics(
            row_ptr, target, columns, factor, WITH_ENTROPY, UNROLL, THREADS, VECTOR
        )
        store_statistics(stats_ptr, row, rows, shift, total, off, logprob, entropy)
        tl.store(logprob_ptr + row, logprob)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + row, entropy)
    else:
        store_statistics(stats_ptr, row, rows, 0.0, 0.0, 0.0, 0.0, 0.0)
        tl.store(logprob_ptr + row, 0.0)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)


@triton.jit
def _backward_kernel(
    logits_ptr,
    out_ptr,
    target_ptr,
    mask_ptr,
    stats_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    scale_ptr,
    divisor_ptr,
    rows,
    columns,
    inner,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    log2e_over_temperature: tl.float64,
    MASKED: tl.constexpr,
    GRAD_LOGPROB: tl.constexpr,
    GRAD_ENTROPY: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    out_row = out_ptr + row_address(row, inner, out_outer_stride, out_inner_stride)
    factor = tl.full((), log2e_over_temperature, DTYPE)
    grad_logprob = factor * 0.0
    grad_entropy = factor * 0.0
    target = 0
    valid = True
    if MASKED:
        valid = tl.load(mask_ptr + row) != 0
    if valid:
        target = checked_target(target_ptr, row, columns)
        scale = factor * LN2  # 1 / temperature
        if SCALED:
            scale *= (tl.load(scale_ptr) / tl.load(divisor_ptr)).to(DTYPE)
        if GRAD_LOGPROB:
            # a target whose logit is -inf has no gradient
            finite = tl.load(stats_ptr + LOGPROB * rows + row) > float("-inf")
            grad_logprob = tl.where(finite, tl.load(grad_logprob_ptr + row).to(DTYPE) * scale, 0.0)
        if GRAD_ENTROPY:
            grad_entropy = tl.load(grad_entropy_ptr + row).to(DTYPE) * scale
    if (grad_logprob == 0.0) & (grad_entropy == 0.0):
        zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
        for start in range(0, columns, BLOCK):
            tl.store(out_row + start + at, zeros, mask=start + at < columns)
    else:
        shift = tl.load(stats_ptr + SHIFT * rows + row)
        total = tl.load(stats_ptr + TOTAL * rows + row)
        # d/dx of logp is onehot - p, of H is -p (log p + H); p = e / total and log p = d ln 2 - log total
        exp_coef = -grad_logprob / total
        term_coef = factor * 0.0
        at_target = grad_logprob * (tl.load(stats_ptr + OFF * rows + row) / total)
        if GRAD_ENTROPY:
            entropy = tl.load(stats_ptr + ENTROPY * rows + row)
            logprob = tl.load(stats_ptr + LOGPROB * rows + row)
            exp_coef += grad_entropy * (tl.log(total) - entropy) / total
            term_coef = -grad_entropy * LN2 / total
            logprob = tl.where(logprob < FAR, FAR, logprob)
            at_target -= grad_entropy * tl.exp(logprob) * (logprob + entropy)
        row_ptr = logits_ptr + row_address(row, inner, outer_stride, inner_stride)
        for start in range(0, columns, BLOCK):
            inside = start + at < columns
            x = tl.load(row_ptr + start + at, mask=inside, other=0.0, eviction_policy="evict_first").to(DTYPE)
            d = (x - shift) * factor
            if GRAD_ENTROPY:
                g = tl.exp2(d) * (exp_coef + term_coef * tl.where(d < FAR, FAR, d))
            else:
                g = tl.exp2(d) * exp_coef
            if (target >= start) & (target < start + BLOCK):
                g = tl.where(at == target - start, at_target, g)
            tl.store(out_row + start + at, g.to(out_ptr.dtype.element_ty), mask=inside)


def forward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of targets' shape (no entropies: empty), and the statistics for `backward`."""
    dtype = result_dtype(logits.dtype)
    columns, count = logits.shape[-1], targets.numel()
    logprobs = logits.new_empty(targets.shape, dtype=dtype)
    entropies = logits.new_empty(targets.shape if entropy else (0,), dtype=dtype)
    stats = logits.new_empty(STATS, count, dtype=dtype)
    if count == 0:
        return logprobs, entropies, stats
    logits, strides, block = strided_rows(logits, FORWARD)
    targets = per_row(targets)
    with torch.cuda.device_of(logits):
        _forward_kernel[(count,)](
            logits,
            targets,
            targets if mask is None else per_row(mask),
            logprobs,
            entropies if entropy else logprobs,
            stats,
            count,
            columns,
            *strides,
            LOG2E / temperature,
            MASKED=mask is not None,
            WITH_ENTROPY=entropy,
            DTYPE=accumulator(logits.dtype),
            **block.options(),
        )
    return logprobs, entropies, stats


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
    temperature: float,
    *,
    scale: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, into `out` (which may be the logits) or into new contiguous memory.

    `scale`: a 0-d factor of both gradients and a 0-d divisor.
    """
    columns, count = logits.shape[-1], targets.numel()
    into = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    if count == 0:
        return into
    source, strides, block = strided_rows(logits, BACKWARD)
    if out is None or row_strides(out) is None:
        written = into if out is None else torch.empty_like(source)
        out_strides = RowStrides(strides.inner, strides.inner * columns, columns)
    else:
        written, out_strides = out, strides
    targets = per_row(targets)
    with torch.cuda.device_of(source):
        _backward_kernel[(count,)](
            source,
            written,
            targets,
            targets if mask is None else per_row(mask),
            stats,
            stats if grad_logprobs is None else per_row(grad_logprobs),
            stats if grad_entropies is None else per_row(grad_entropies),
            stats if scale is None else scale[0],
            stats if scale is None else scale[1],
            count,
            columns,
            *strides,
            *out_strides[1:],
            LOG2E / temperature,
            num_warps=block.warps,
            num_stages=2,
            MASKED=mask is not None,
            GRAD_LOGPROB=grad_logprobs is not None,
            GRAD_ENTROPY=grad_entropies is not None,
            SCALED=scale is not None,
            DTYPE=accumulator(logits.dtype),
            BLOCK=block.unroll * block.threads * block.vector,
        )
    if written is not into:
        into.copy_(written)
    elif out is not None:
        torch.autograd.graph.increment_version(out)  # torch did not see the kernel write
    return into
