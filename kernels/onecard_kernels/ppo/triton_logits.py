"""PPO's policy loss from logits in Triton: each row is read once for log-probability, entropy and loss.

Forward: one launch over the rows, and one that adds up in a fixed order. Per row, the forward saves the softmax's
statistics, and the derivatives of the loss by log-probability and entropy. Backward: one launch, which computes the
gradient from them. Rows whose derivatives are 0 (clipped, masked) are not read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logprob import triton_rows as rows
from ..logprob.triton_row_parts import MaxBlock, checked_target, row_address, row_statistics, store_statistics
from ..records import result_dtype
from .options import SUMS, PolicyOptions, PolicyTokens
from .triton import add_entropy_and_weight, finish, policy_choices, policy_numbers, token_terms

MAX_BLOCK = MaxBlock()


@triton.jit
def _forward_kernel(
    logits_ptr,
    target_ptr,
    mask_ptr,
    old_ptr,
    advantage_ptr,
    ref_ptr,
    weight_ptr,
    stats_ptr,
    sums_ptr,
    slope_ptr,
    entropy_slope_ptr,
    rows,
    columns,
    inner,
    outer_stride,
    inner_stride,
    log2e_over_temperature: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    HAS_OLD: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    ENTROPY_IN_LOSS: tl.constexpr,
    HAS_REF: tl.constexpr,
    KL_IN_LOSS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    sums = sums_ptr + row
    LOSS_DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    valid = tl.load(mask_ptr + row) != 0
    if valid:
        factor = tl.full((), log2e_over_temperature, DTYPE)
        row_ptr = logits_ptr + row_address(row, inner, outer_stride, inner_stride)
        target = checked_target(target_ptr, row, columns)
        shift, total, off, logprob, entropy = row_statistics(
            row_ptr, target, columns, factor, True, UNROLL, THREADS, VECTOR
        )
        store_statistics(stats_ptr, row, rows, shift, total, off, logprob, entropy)
        logprob = logprob.to(LOSS_DTYPE)
        entropy = entropy.to(LOSS_DTYPE)
        old = logprob
        if HAS_OLD:
            old = tl.load(old_ptr + row).to(LOSS_DTYPE)
        ref = logprob
        if HAS_REF:
            ref = tl.load(ref_ptr + row).to(LOSS_DTYPE)
        loss, slope, approxkl, is_clipped, ratio, kl = token_terms(
            logprob,
            old,
            tl.load(advantage_ptr + row).to(LOSS_DTYPE),
            ref,
            valid,
            clip_low,
            clip_high,
            dual_clip,
            kl_coef,
            HAS_REF,
            HAS_DUAL,
            KL_IN_LOSS,
            ESTIMATOR,
        )
        weight = tl.full((), 1.0, LOSS_DTYPE)
        if HAS_WEIGHTS:
            weight = tl.load(weight_ptr + row).to(LOSS_DTYPE)
        loss, slope, entropy_slope = add_entropy_and_weight(
            loss, slope, entropy, weight, entropy_coef, ENTROPY_IN_LOSS, HAS_WEIGHTS
        )
        if ENTROPY_IN_LOSS:
            tl.store(entropy_slope_ptr + row, entropy_slope)
        tl.store(slope_ptr + row, slope)
        tl.store(sums, loss)
        tl.store(sums + rows, approxkl)
        tl.store(sums + 2 * rows, is_clipped)
        tl.store(sums + 3 * rows, ratio)
        tl.store(sums + 4 * rows, entropy)
        tl.store(sums + 5 * rows, kl)
        tl.store(sums + 6 * rows, weight * 0.0 + 1.0)
    else:
        store_statistics(stats_ptr, row, rows, 0.0, 0.0, 0.0, 0.0, 0.0)
        tl.store(slope_ptr + row, 0.0)
        if ENTROPY_IN_LOSS:
            tl.store(entropy_slope_ptr + row, 0.0)
        for i in tl.static_range(7):  # len(SUMS)
            tl.store(sums + i * rows, 0.0)


def forward(
    logits: Tensor,
    targets: Tensor,
    tokens: PolicyTokens,
    options: PolicyOptions,
    temperature: float,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, all sums over the divisor, divisor; per row: statistics, derivatives by logp and by entropy)."""
    dtype = tokens.dtype_with(logits)
    columns, count = logits.shape[-1], targets.numel()
    stats = logits.new_empty(rows.STATS, count, dtype=result_dtype(logits.dtype))
    slope = logits.new_empty(count, dtype=dtype)
    entropy_slope = logits.new_empty(count if options.entropy_in_loss else 0, dtype=dtype)
    if count == 0:
        return *finish(logits.new_zeros(len(SUMS), 1, dtype=dtype), normalizer), stats, slope, entropy_slope
    sums = logits.new_empty(len(SUMS), count, dtype=dtype)
    logits, strides, block = rows.strided_rows(logits, MAX_BLOCK)
    per_token = (targets, tokens.mask, tokens.advantages if tokens.old_logprobs is None else tokens.old_logprobs)
    with torch.cuda.device_of(logits):
        _forward_kernel[(count,)](
            logits,
            *map(rows.per_row, (*per_token, tokens.advantages)),
            *(stats if x is None else rows.per_row(x) for x in (tokens.ref_logprobs, tokens.weights)),
            stats,
            sums,
            slope,
            entropy_slope,
            count,
            columns,
            *strides,
            rows.LOG2E / temperature,
            *policy_numbers(options),
            HAS_OLD=tokens.old_logprobs is not None,
            ENTROPY_IN_LOSS=options.entropy_in_loss,
            DTYPE=rows.accumulator(logits.dtype),
            **block.options(),
            **policy_choices(tokens, options),
        )
    return *finish(sums, normalizer), stats, slope, entropy_slope


def backward(
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
    """The gradient of the logits, for the gradient `grad` (0-d) of the loss."""
    grad_entropy = entropy_slope if entropy_slope.numel() else None
    return rows.backward(logits, targets, mask, stats, slope, grad_entropy, temperature, scale=(grad, divisor))
