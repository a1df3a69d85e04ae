"""Row kernels over logits: log-softmax of the targets with entropy, and its gradient.

One program per row. A block of the row is `[UNROLL, THREADS, VECTOR]`: VECTOR neighbours are one 16-byte load of one
thread, so sums over the first and the last axis stay inside the thread. Each thread keeps an online softmax of its own
and the loop has no barrier; they are joined once, at the end of the row.

Exponents are base 2 (`factor` is log2(e) / temperature), as the hardware's are. Shifts are logits as they came: the
difference to them is taken first, so large logits lose no digits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .passes import result_dtype
from .selective import STATS

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
LOWEST = tl.constexpr(-1e20)  # a finite stand-in for -inf, so that no shift is -inf - -inf
FAR = tl.constexpr(-2000.0)  # 2^-2000 is 0 in fp64 too; a finite exponent, for 0 * -inf is NaN

# Per-row statistics that the backward reads, `[STATS, rows]`.
SHIFT, TOTAL, OFF, LOGPROB, ENTROPY = (tl.constexpr(i) for i in range(STATS))

BYTES_PER_THREAD = 64  # four 16-byte loads of each thread in flight
MAX_WARPS = 8


class Block(NamedTuple):
    unroll: int
    threads: int
    vector: int
    warps: int


def block_for(columns: int, itemsize: int, *strides: int) -> Block:
    """Enough bytes in flight on long rows, no more threads than short ones have work for.

    Rows that do not all begin at 16 bytes (an odd vocabulary) have no wide loads: neighbours then go to neighbouring
    threads, so that one load of a warp is one piece of memory still.
    """
    vector = max(1, 16 // itemsize)
    unroll = BYTES_PER_THREAD // (32 if itemsize == 8 else 16)  # fp64 takes two registers a number
    warps = MAX_WARPS
    while warps > 1 and 32 * warps * vector * unroll >= 2 * columns:
        warps //= 2
    while unroll > 1 and 32 * warps * vector * unroll >= 2 * columns:
        unroll //= 2
    if any(stride % vector for stride in strides):
        unroll, vector = unroll * vector, 1
    return Block(unroll, 32 * warps, vector, warps)


class RowStrides(NamedTuple):
    """Row r begins at `r // inner * outer_stride + r % inner * inner_stride`."""

    inner: int
    outer_stride: int
    inner_stride: int


def row_strides(x: Tensor) -> RowStrides | None:
    """Of `[..., V]` with columns side by side; None if its rows are no two nested loops."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    loops: list[tuple[int, int]] = []
    for size, stride in reversed(list(zip(x.shape[:-1], x.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if loops and stride == loops[-1][0] * loops[-1][1]:
            loops[-1] = (loops[-1][0] * size, loops[-1][1])
        else:
            loops.append((size, stride))
    if len(loops) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = [*loops, (1, 0), (1, 0)][:2]
    return RowStrides(inner, outer_stride, inner_stride)


def with_strides(x: Tensor) -> tuple[Tensor, RowStrides]:
    """x itself if its rows can be reached by strides, a contiguous copy if not."""
    strides = row_strides(x)
    return (x, strides) if strides is not None else (x.contiguous(), RowStrides(x.shape[:-1].numel(), 0, x.shape[-1]))


def per_row(x: Tensor) -> Tensor:
    """One after the other in memory: a gradient may be expanded (stride 0), and so may targets and masks."""
    return x.reshape(-1).contiguous()


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def row_address(row, inner, outer_stride, inner_stride):
    row = row.to(tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def log1p(x):
    """For x >= 0. 1 + x loses digits of x; dividing by what arrived gives them back."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _fold(x, factor, shift, off, moment, MOMENT: tl.constexpr):
    """Each thread's online softmax, one block further."""
    higher = tl.maximum(shift, tl.max(tl.max(x, axis=2), axis=0))
    d = (x - higher[None, :, None]) * factor
    e = tl.exp2(d)
    moved = (shift - higher) * factor
    keep = tl.exp2(moved)
    if MOMENT:
        terms = e * tl.where(d < FAR, FAR, d)
        moment = (moment + off * moved) * keep + tl.sum(tl.sum(terms, axis=2), axis=0)
    off = off * keep + tl.sum(tl.sum(e, axis=2), axis=0)
    return higher, off, moment


@triton.jit
def row_statistics(
    row_ptr,
    target,
    columns,
    factor,
    MOMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(shift, total, off, logp, entropy) of a row: with e = 2^((x - shift) factor), the sums of e with and without the
    target's; log p_y and the entropy (0 unless MOMENT) in nats."""
    BLOCK: tl.constexpr = UNROLL * THREADS * VECTOR
    DTYPE: tl.constexpr = factor.dtype
    thread = tl.arange(0, THREADS)[None, :, None] * VECTOR
    place = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR) + tl.arange(0, VECTOR)[None, None, :]
    x_target = tl.load(row_ptr + target).to(DTYPE)
    shift = tl.full([THREADS], LOWEST, DTYPE)
    off = tl.zeros([THREADS], DTYPE)
    moment = tl.zeros([THREADS], DTYPE)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(row_ptr + (start + thread + place), eviction_policy="evict_first").to(DTYPE)
        if (target >= start) & (target < start + BLOCK):
            x = tl.where(place == target - start - thread, float("-inf"), x)
        shift, off, moment = _fold(x, factor, shift, off, moment, MOMENT)
    if whole < columns:
        at = whole + thread + place
        x = tl.load(row_ptr + at, mask=at < columns, other=float("-inf"), eviction_policy="evict_first").to(DTYPE)
        x = tl.where(at == target, float("-inf"), x)
        shift, off, moment = _fold(x, factor, shift, off, moment, MOMENT)
    top = tl.maximum(tl.max(shift, axis=0), x_target)
    moved = (shift - top) * factor
    keep = tl.exp2(moved)
    sum_off = tl.sum(off * keep, axis=0)
    below = (x_target - top) * factor
    e_target = tl.exp2(below)
    total = sum_off + e_target
    log_sum = tl.log(total)
    # By the odds against it where p_y > 1/2, so that 1 - p_y never comes out of 1 minus something.
    likely = e_target > sum_off
    odds = tl.where(likely, sum_off, 0.0) / tl.where(likely, e_target, 1.0)
    logprob = tl.where(likely, -log1p(odds), below * LN2 - log_sum)
    entropy = total * 0.0
    if MOMENT:
        # In this form each term is small where the entropy is: near p_y = 1 both are of the size of 1 - p_y.
        sum_moment = tl.sum((moment + off * moved) * keep, axis=0)
        of_target = tl.where(e_target > 0.0, -e_target * tl.where(e_target > 0.0, logprob, 0.0), 0.0)
        entropy = (of_target + sum_off * log_sum - LN2 * sum_moment) / total
    return top, total, sum_off, logprob, entropy


@triton.jit
def store_statistics(stats_ptr, row, rows, shift, total, off, logprob, entropy):
    tl.store(stats_ptr + SHIFT * rows + row, shift)
    tl.store(stats_ptr + TOTAL * rows + row, total)
    tl.store(stats_ptr + OFF * rows + row, off)
    tl.store(stats_ptr + LOGPROB * rows + row, logprob)
    tl.store(stats_ptr + ENTROPY * rows + row, entropy)


@triton.jit
def checked_target(target_ptr, row, columns):
    """The row's target as an address inside the row, whatever it is."""
    target = tl.load(target_ptr + row).to(tl.int64)
    tl.device_assert((target >= 0) & (target < columns), "targets holds an id outside of the vocabulary")
    return tl.minimum(tl.maximum(target, 0), columns - 1).to(tl.int32)


# Numbers are annotated: a Python float would arrive as fp32, too coarse for fp64 logits.
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
    on_logprob_ptr,
    on_entropy_ptr,
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
    ON_LOGPROB: tl.constexpr,
    ON_ENTROPY: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    out_row = out_ptr + row_address(row, inner, out_outer_stride, out_inner_stride)
    factor = tl.full((), log2e_over_temperature, DTYPE)
    on_logprob = factor * 0.0
    on_entropy = factor * 0.0
    target = 0
    valid = True
    if MASKED:
        valid = tl.load(mask_ptr + row) != 0
    if valid:
        target = checked_target(target_ptr, row, columns)
        scale = factor * LN2  # 1 / temperature
        if SCALED:
            scale *= (tl.load(scale_ptr) / tl.load(divisor_ptr)).to(DTYPE)
        if ON_LOGPROB:
            # a target of -inf is a constant
            possible = tl.load(stats_ptr + LOGPROB * rows + row) > float("-inf")
            on_logprob = tl.where(possible, tl.load(on_logprob_ptr + row).to(DTYPE) * scale, 0.0)
        if ON_ENTROPY:
            on_entropy = tl.load(on_entropy_ptr + row).to(DTYPE) * scale
    if (on_logprob == 0.0) & (on_entropy == 0.0):
        nothing = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
        for start in range(0, columns, BLOCK):
            tl.store(out_row + start + at, nothing, mask=start + at < columns)
    else:
        shift = tl.load(stats_ptr + SHIFT * rows + row)
        total = tl.load(stats_ptr + TOTAL * rows + row)
        # d/dx of logp is onehot - p, of H is -p (log p + H); p = e / total and log p = d ln 2 - log total
        flat = -on_logprob / total
        steep = factor * 0.0
        at_target = on_logprob * (tl.load(stats_ptr + OFF * rows + row) / total)
        if ON_ENTROPY:
            entropy = tl.load(stats_ptr + ENTROPY * rows + row)
            logprob = tl.load(stats_ptr + LOGPROB * rows + row)
            flat += on_entropy * (tl.log(total) - entropy) / total
            steep = -on_entropy * LN2 / total
            logprob = tl.where(logprob < FAR, FAR, logprob)
            at_target -= on_entropy * tl.exp(logprob) * (logprob + entropy)
        row_ptr = logits_ptr + row_address(row, inner, outer_stride, inner_stride)
        for start in range(0, columns, BLOCK):
            inside = start + at < columns
            x = tl.load(row_ptr + start + at, mask=inside, other=0.0, eviction_policy="evict_first").to(DTYPE)
            d = (x - shift) * factor
            if ON_ENTROPY:
                g = tl.exp2(d) * (flat + steep * tl.where(d < FAR, FAR, d))
            else:
                g = tl.exp2(d) * flat
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
    logits, strides = with_strides(logits)
    block = block_for(columns, logits.element_size(), strides.outer_stride, strides.inner_stride)
    targets = per_row(targets)
    launch.launch(
        _forward_kernel,
        (count,),
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
        num_warps=block.warps,
        MASKED=mask is not None,
        WITH_ENTROPY=entropy,
        DTYPE=accumulator(logits.dtype),
        UNROLL=block.unroll,
        THREADS=block.threads,
        VECTOR=block.vector,
    )
    return logprobs, entropies, stats


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    on_logprobs: Tensor | None,
    on_entropies: Tensor | None,
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
    source, strides = with_strides(logits)
    if out is None or row_strides(out) is None:
        written = into if out is None else torch.empty_like(source)
        out_strides = RowStrides(strides.inner, strides.inner * columns, columns)
    else:
        written, out_strides = out, strides
    block = block_for(columns, logits.element_size(), strides.outer_stride, strides.inner_stride)
    targets = per_row(targets)
    launch.launch(
        _backward_kernel,
        (count,),
        source,
        written,
        targets,
        targets if mask is None else per_row(mask),
        stats,
        stats if on_logprobs is None else per_row(on_logprobs),
        stats if on_entropies is None else per_row(on_entropies),
        stats if scale is None else scale[0],
        stats if scale is None else scale[1],
        count,
        columns,
        *strides,
        *out_strides[1:],
        LOG2E / temperature,
        num_warps=block.warps,
        MASKED=mask is not None,
        ON_LOGPROB=on_logprobs is not None,
        ON_ENTROPY=on_entropies is not None,
        SCALED=scale is not None,
        DTYPE=accumulator(logits.dtype),
        BLOCK=block.unroll * block.threads * block.vector,
    )
    if written is not into:
        into.copy_(written)
    elif out is not None:
        torch.autograd.graph.increment_version(out)  # torch did not see the kernel write
    return into
