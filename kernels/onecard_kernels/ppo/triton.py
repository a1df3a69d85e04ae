"""PPO's losses from log-probabilities in Triton: a launch over the tokens, one that adds up, one for the gradient.

The first launch writes one sum for each program, and the derivative of each token's loss. The second adds the sums in a
fixed order, so two runs agree in every bit. The launching functions take tensors of any shape, and have no autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .options import SUMS, VALUE_SUMS, PolicyOptions, PolicyTokens, dtype_of

BLOCK = 1024  # tokens of one program
PER_THREAD = 4  # tokens, one load of 16 bytes in fp32
COLUMNS = 1024  # programs whose sums are added at once


@triton.jit
def _exp(x):
    """e^x for |x| <= 20. The hardware's exp2(x log2(e)) would be wrong by |x| / 2 ulps, from the rounded product."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        result = tl.exp2(n) * tl.exp((x - n * 0.693359375) + n * 2.12194440054690583e-4)
    return result


@triton.jit
def _log_ratio(logp, other):
    """(logp - other, or 0 where both are -inf; whether it has a derivative)"""
    both = (logp == float("-inf")) & (other == float("-inf"))
    return tl.where(both, 0.0, logp - other), ~both


@triton.jit
def _clamp(x, low, high):
    """(torch.clamp(x, low, high), whether x is inside). NaN stays NaN, and the borders count as inside."""
    return tl.where(x < low, low, tl.where(x > high, high, x)), (x >= low) & (x <= high)


@triton.jit
def _larger(x, y):
    """(torch.maximum(x, y), its derivative by x): 1/2 at a tie, as torch's."""
    return tl.where(x > y, x, y), tl.where(x == y, 0.5, tl.where(x > y, 1.0, 0.0))


@triton.jit
def _k3(d, TERMS: tl.constexpr):
    """k3 = exp(-d) - 1 + d and its derivative. Near 0 by d^2/2 (1 - d/3 (1 - d/4 (1 - ...))), which does not cancel."""
    tail = d * 0.0 + 1.0
    for i in tl.static_range(TERMS):
        tail = 1.0 - tail * d * (1.0 / (TERMS + 2 - i))
    series = 0.5 * d * d * tail
    e = _exp(-d)
    near = tl.abs(d) < 1.0
    return tl.where(near, series, e - 1.0 + d), tl.where(near, d - series, 1.0 - e)


@triton.jit
def _divergence(logp, ref, ESTIMATOR: tl.constexpr):
    """An estimate of KL(policy || reference), and its derivative by logp."""
    d, has_slope = _log_ratio(logp, ref)
    if ESTIMATOR == "k1":
        kl, slope = d, tl.where(has_slope, 1.0, 0.0).to(d.dtype)
    elif ESTIMATOR == "k2":
        kl, slope = 0.5 * d * d, d
    else:
        d, inside = _clamp(d, -20.0, 20.0)
        if d.dtype == tl.float64:
            kl, slope = _k3(d, 18)
        else:
            kl, slope = _k3(d, 9)
        slope = tl.where(inside & has_slope, slope, 0.0)
    return kl, slope


@triton.jit
def token_terms(
    logp,
    old,
    adv,
    ref,
    valid,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    HAS_REF: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    KL_IN_LOSS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
):
    """Loss and metrics of one token or a block of them; see `ppo_loss` for the formulas.

    logp, old, adv and ref (logp if there is none) have one dtype, fp32 or fp64. ESTIMATOR is k1, k2 or k3. Any value is
    allowed at invalid tokens. The coefficients are fp64 scalars, for exact borders of the clip range.

    Returns the loss (without entropy and weight), d loss / d logp, half the squared log-ratio, 1 where the clip range
    sets the gradient to 0, the ratio, and the divergence: all of logp's dtype, and 0 for invalid tokens.
    """
    dtype: tl.constexpr = logp.dtype
    logp = tl.where(valid, logp, 0.0)
    old = tl.where(valid, old, 0.0)
    a = tl.where(valid, adv, 0.0)

    d, has_slope = _log_ratio(logp, old)
    d, inside = _clamp(d, -20.0, 20.0)
    ratio = _exp(d)
    clamped, in_range = _clamp(ratio, tl.full((), 1.0 - clip_low, dtype), tl.full((), 1.0 + clip_high, dtype))
    unclipped, clipped = -a * ratio, -a * clamped
    loss, share = _larger(unclipped, clipped)
    slope = unclipped * tl.where(in_range, 1.0, share)  # in the range, both arguments of the maximum are the same
    if HAS_DUAL:
        bound = a * tl.full((), -dual_clip, dtype)
        _, over = _larger(loss, bound)
        bounded = a < 0.0
        slope = tl.where(bounded, slope * (1.0 - over), slope)
        loss = tl.where(bounded & (loss > bound), bound, loss)
    slope = tl.where(inside & has_slope, slope, 0.0)
    kl = tl.full(loss.shape, 0.0, dtype)
    if HAS_REF:
        kl, kl_slope = _divergence(logp, tl.where(valid, ref, 0.0), ESTIMATOR)
        if KL_IN_LOSS:
            coef = tl.full((), kl_coef, dtype)
            loss += coef * kl
            slope += tl.where(valid, coef * kl_slope, 0.0)
    is_clipped = tl.where(clipped > unclipped, 1.0, 0.0).to(dtype)
    return loss, slope, 0.5 * d * d, is_clipped, tl.where(valid, ratio, 0.0), kl


@triton.jit
def add_entropy_and_weight(
    loss, slope, entropy, weight, entropy_coef, ENTROPY_IN_LOSS: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):
    """(loss, d loss / d logp, d loss / d entropy) with the entropy bonus, times the weight (1 where valid)."""
    entropy_slope = tl.full(loss.shape, 0.0, loss.dtype)
    if ENTROPY_IN_LOSS:
        coef = tl.full((), entropy_coef, loss.dtype)
        loss -= coef * entropy
        entropy_slope = -coef * weight
    if HAS_WEIGHTS:
        loss *= weight
        slope *= weight
    return loss, slope, entropy_slope


@triton.jit
def _load(pointer, t, inside, dtype: tl.constexpr):
    return tl.load(pointer + t, mask=inside, other=0).to(dtype)


@triton.jit
def _store_sum(sums_ptr, row: tl.constexpr, x):
    tl.store(sums_ptr + row * tl.num_programs(0).to(tl.int64) + tl.program_id(0), tl.sum(x, 0))


# Scalars are annotated fp64: an unannotated Python float would be fp32, too coarse for fp64 tensors.
@triton.jit
def policy_kernel(
    logp_ptr,
    old_ptr,
    adv_ptr,
    mask_ptr,
    entropy_ptr,
    ref_ptr,
    weights_ptr,
    sums_ptr,
    slope_ptr,
    entropy_slope_ptr,
    n,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    HAS_DUAL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ENTROPY_IN_LOSS: tl.constexpr,
    HAS_REF: tl.constexpr,
    KL_IN_LOSS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SLOPE: tl.constexpr,
    ENTROPY_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < n
    valid = _load(mask_ptr, t, inside, tl.float32) != 0
    logp = _load(logp_ptr, t, inside, dtype)
    old = _load(old_ptr, t, inside, dtype)
    adv = _load(adv_ptr, t, inside, dtype)
    ref = logp
    if HAS_REF:
        ref = _load(ref_ptr, t, inside, dtype)
    loss, slope, approxkl, is_clipped, ratio, kl = token_terms(
        logp, old, adv, ref, valid, clip_low, clip_high, dual_clip, kl_coef, HAS_REF, HAS_DUAL, KL_IN_LOSS, ESTIMATOR
    )
    count = tl.where(valid, 1.0, 0.0).to(dtype)
    entropy = tl.zeros_like(loss)
    if HAS_ENTROPY:
        entropy = tl.where(valid, _load(entropy_ptr, t, inside, dtype), 0.0)
    weight = count
    if HAS_WEIGHTS:
        weight = tl.where(valid, _load(weights_ptr, t, inside, dtype), 0.0)
    loss, slope, entropy_slope = add_entropy_and_weight(
        loss, slope, entropy, weight, entropy_coef, ENTROPY_IN_LOSS, HAS_WEIGHTS
    )
    if SLOPE:
        tl.store(slope_ptr + t, slope, mask=inside)
    if ENTROPY_SLOPE:
        tl.store(entropy_slope_ptr + t, entropy_slope, mask=inside)
    _store_sum(sums_ptr, 0, loss)
    _store_sum(sums_ptr, 1, approxkl)
    _store_sum(sums_ptr, 2, is_clipped)
    _store_sum(sums_ptr, 3, ratio)
    _store_sum(sums_ptr, 4, entropy)
    _store_sum(sums_ptr, 5, kl)
    _store_sum(sums_ptr, 6, count)


@triton.jit
def value_kernel(
    values_ptr,
    old_ptr,
    returns_ptr,
    mask_ptr,
    weights_ptr,
    sums_ptr,
    slope_ptr,
    n,
    clip: tl.float64,
    HAS_CLIP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < n
    valid = _load(mask_ptr, t, inside, tl.float32) != 0
    v = tl.where(valid, _load(values_ptr, t, inside, dtype), 0.0)
    target = tl.where(valid, _load(returns_ptr, t, inside, dtype), 0.0)
    slope = v - target
    loss = slope * slope
    is_clipped = tl.zeros_like(loss)
    if HAS_CLIP:
        old = tl.where(valid, _load(old_ptr, t, inside, dtype), 0.0)
        reach = tl.full((), clip, dtype)
        clamped, in_range = _clamp(v, old - reach, old + reach)
        clipped = (clamped - target) * (clamped - target)
        is_clipped = tl.where(clipped > loss, 1.0, 0.0).to(dtype)
        loss, share = _larger(loss, clipped)
        slope *= tl.where(in_range, 1.0, share)
    loss *= 0.5
    if HAS_WEIGHTS:
        weight = tl.where(valid, _load(weights_ptr, t, inside, dtype), 0.0)
        loss *= weight
        slope *= weight
    if SLOPE:
        tl.store(slope_ptr + t, slope, mask=inside)
    _store_sum(sums_ptr, 0, loss)
    _store_sum(sums_ptr, 1, is_clipped)
    _store_sum(sums_ptr, 2, tl.where(valid, 1.0, 0.0).to(dtype))


@triton.jit
def _divide(x, y):
    """x / y, correctly rounded. With the fast fp32 division of the hardware, 3 / 3 need not be 1."""
    if x.dtype == tl.float64:
        result = x / y
    else:
        result = tl.div_rn(x, y)
    return result


@triton.jit
def finish_kernel(
    sums_ptr,
    normalizer_ptr,
    loss_ptr,
    totals_ptr,
    divisor_ptr,
    programs,
    number: tl.float64,
    NORMALIZER: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Divide the sums of all programs by a number, by a tensor's value, or by the last sum (at least 1)."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype)
    for start in range(0, programs, COLUMNS):
        at = start + column
        inside = (row[:, None] < SUMS) & (at[None, :] < programs)
        total += tl.load(sums_ptr + row[:, None].to(tl.int64) * programs + at[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, 1)
    if NORMALIZER == "count":
        count = tl.sum(tl.where(row == SUMS - 1, sums, 0.0), 0)
        divisor = tl.where(count < 1.0, 1.0, count).to(dtype)
    elif NORMALIZER == "tensor":
        divisor = tl.load(normalizer_ptr).to(dtype)
    else:
        divisor = tl.full((), number, dtype)
    sums = _divide(sums, tl.zeros_like(sums) + divisor)
    tl.store(totals_ptr + row, sums, mask=row < SUMS)
    tl.store(loss_ptr + row, sums, mask=row == 0)
    tl.store(divisor_ptr, divisor)


@triton.jit
def scale_kernel(
    grad_ptr,
    divisor_ptr,
    first_ptr,
    second_ptr,
    first_out_ptr,
    second_out_ptr,
    n,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = divisor_ptr.dtype.element_ty
    factor = _divide(tl.load(grad_ptr).to(dtype), tl.load(divisor_ptr))
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < n
    if FIRST:
        x = _load(first_ptr, t, inside, dtype) * factor
        tl.store(first_out_ptr + t, x.to(first_out_ptr.dtype.element_ty), mask=inside)
    if SECOND:
        x = _load(second_ptr, t, inside, dtype) * factor
        tl.store(second_out_ptr + t, x.to(second_out_ptr.dtype.element_ty), mask=inside)


class Terms(NamedTuple):
    """`PolicyTerms` with the sums over the divisor (`totals`), the 0-d loss (the first of them) and the 0-d divisor."""

    loss: Tensor
    totals: Tensor
    divisor: Tensor
    grad: Tensor
    entropy_grad: Tensor


def _blocks(n: int) -> tuple[int, int]:
    """(number of programs, tokens of each). At least one program, so that there is a sum without tokens too."""
    block = min(BLOCK, max(32, triton.next_power_of_2(n)))
    return max(1, triton.cdiv(n, block)), block


def _warps(block: int) -> int:
    return max(1, block // (32 * PER_THREAD))


def as_loadable(mask: Tensor) -> Tensor:
    """View bools as bytes, without a copy."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def policy_numbers(options: PolicyOptions) -> tuple[float, ...]:
    """The options' numbers, in the order in which every policy kernel takes them."""
    dual_clip = 0.0 if options.dual_clip is None else options.dual_clip
    return options.clip_low, options.clip_high, dual_clip, options.entropy_coef, options.kl_coef


def policy_choices(tokens: PolicyTokens, options: PolicyOptions) -> dict[str, Any]:
    """The compile-time arguments that every policy kernel takes."""
    return {
        "HAS_DUAL": options.dual_clip is not None,
        "HAS_REF": tokens.ref_logprobs is not None,
        "KL_IN_LOSS": options.kl_in_loss,
        "ESTIMATOR": options.kl_estimator,
        "HAS_WEIGHTS": tokens.weights is not None,
    }


def policy_terms(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    *,
    normalizer: float | Tensor | None = 1.0,
    needs_slope: bool = True,
    needs_entropy_slope: bool = True,
) -> Terms:
    dtype = tokens.dtype_with(logprobs, entropy)
    logp = logprobs.contiguous()
    n = logp.numel()
    programs, block = _blocks(n)
    entropy_in_loss = entropy is not None and options.entropy_in_loss
    needs_entropy_slope = needs_entropy_slope and entropy_in_loss
    sums = logp.new_empty((len(SUMS), programs), dtype=dtype)
    slope, entropy_slope = (
        logp.new_empty(logp.shape if needed else (0,), dtype=dtype) for needed in (needs_slope, needs_entropy_slope)
    )
    with torch.cuda.device_of(logp):
        policy_kernel[(programs,)](
            logp,
            logp if tokens.old_logprobs is None else tokens.old_logprobs.contiguous(),
            tokens.advantages.contiguous(),
            as_loadable(tokens.mask),
            *(logp if x is None else x.contiguous() for x in (entropy, tokens.ref_logprobs, tokens.weights)),
            sums,
            slope,
            entropy_slope,
            n,
            *policy_numbers(options),
            num_warps=_warps(block),
            num_stages=2,
            HAS_ENTROPY=entropy is not None,
            ENTROPY_IN_LOSS=entropy_in_loss,
            SLOPE=needs_slope,
            ENTROPY_SLOPE=needs_entropy_slope,
            BLOCK=block,
            **policy_choices(tokens, options),
        )
    return Terms(*finish(sums, normalizer), slope, entropy_slope)


def value_terms(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    weights: Tensor | None,
    normalizer: float | Tensor | None = None,
    needs_slope: bool = True,
) -> Terms:
    dtype = dtype_of(values, old_values, returns, weights)
    v = values.contiguous()
    n = v.numel()
    programs, block = _blocks(n)
    sums = v.new_empty((len(VALUE_SUMS), programs), dtype=dtype)
    slope = v.new_empty(v.shape if needs_slope else (0,), dtype=dtype)
    with torch.cuda.device_of(v):
        value_kernel[(programs,)](
            v,
            v if old_values is None else old_values.contiguous(),
            returns.contiguous(),
            as_loadable(mask),
            v if weights is None else weights.contiguous(),
            sums,
            slope,
            n,
            0.0 if clip is None else clip,
            num_warps=_warps(block),
            num_stages=2,
            HAS_CLIP=clip is not None,
            HAS_WEIGHTS=weights is not None,
            SLOPE=needs_slope,
            BLOCK=block,
        )
    return Terms(*finish(sums, normalizer), slope, v.new_empty((0,), dtype=dtype))


def finish(sums: Tensor, normalizer: float | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, totals, divisor) of the programs' sums `[sums, programs]`; the last sum is the number of valid tokens."""
    rows, programs = sums.shape
    columns = min(COLUMNS, triton.next_power_of_2(programs))
    result = (sums.new_empty(()), sums.new_empty((rows,)), sums.new_empty(()))
    with torch.cuda.device_of(sums):
        finish_kernel[(1,)](
            sums,
            normalizer.to(sums.device) if isinstance(normalizer, Tensor) else sums,
            *result,
            programs,
            0.0 if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer),
            num_warps=8 if columns > 256 else 4,
            num_stages=2,
            NORMALIZER="tensor" if isinstance(normalizer, Tensor) else "count" if normalizer is None else "number",
            SUMS=rows,
            ROWS=triton.next_power_of_2(rows),
            COLUMNS=columns,
        )
    return result


def scale(
    grad: Tensor, divisor: Tensor, slope: Tensor, entropy_slope: Tensor, dtype: torch.dtype, entropy_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both derivatives times grad / divisor, in the dtypes of logprobs and entropy."""
    outs = slope.new_empty(slope.shape, dtype=dtype), entropy_slope.new_empty(entropy_slope.shape, dtype=entropy_dtype)
    n = max(slope.numel(), entropy_slope.numel())
    if n == 0:
        return outs
    programs, block = _blocks(n)
    with torch.cuda.device_of(grad):
        scale_kernel[(programs,)](
            grad,
            divisor,
            slope,
            entropy_slope,
            *outs,
            n,
            num_warps=_warps(block),
            num_stages=2,
            FIRST=slope.numel() > 0,
            SECOND=entropy_slope.numel() > 0,
            BLOCK=block,
        )
    return outs
