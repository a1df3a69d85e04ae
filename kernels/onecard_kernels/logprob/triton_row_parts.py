"""Parts of the kernels over rows of logits: addresses of rows, blocks of loads, statistics of the softmax.

A block of the row is `[UNROLL, THREADS, VECTOR]`. VECTOR neighbours are one 16-byte load of one thread, so sums over
the first and the last axis stay inside the thread. Each thread has its own online softmax, so the loop has no barrier.
They are merged once, at the end of the row.

Exponents are base 2 (`factor` is log2(e) / temperature), as the hardware's are. A shift is a logit before it is
multiplied by `factor`. It is subtracted first, so large logits lose no digits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_rows import STATS
from .triton_math import log1p

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
LOWEST = tl.constexpr(-1e20)  # a finite stand-in for -inf, so that no shift is -inf - -inf
FAR = tl.constexpr(-2000.0)  # 2^-2000 is 0 in fp64 too; a finite exponent, for 0 * -inf is NaN

# Per-row statistics that the backward reads, `[STATS, rows]`.
SHIFT, TOTAL, OFF, LOGPROB, ENTROPY = (tl.constexpr(i) for i in range(STATS))


class MaxBlock(NamedTuple):
    """The block for long rows. Each kernel has its own, to be measured on a GPU."""

    thread_bytes: int = 64  # four 16-byte loads of each thread in flight
    warps: int = 8


class Block(NamedTuple):
    unroll: int
    threads: int
    vector: int
    warps: int

    def options(self) -> dict[str, int]:
        """The options of a launch that depend on the block."""
        return {
            "num_warps": self.warps,
            "num_stages": 2,
            "UNROLL": self.unroll,
            "THREADS": self.threads,
            "VECTOR": self.vector,
        }


def block_for(columns: int, itemsize: int, *strides: int, largest: MaxBlock) -> Block:
    """The block for a row: enough bytes in flight on long rows, no idle threads on short ones.

    Where rows do not all begin at a multiple of 16 bytes (an odd vocabulary) there are no wide loads. Neighbours then
    go to neighbouring threads, so that one load of a warp is still contiguous.
    """
    vector = max(1, 16 // itemsize)
    unroll = largest.thread_bytes // (32 if itemsize == 8 else 16)  # an fp64 number takes two registers
    warps = largest.warps
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
    """Strides of the rows of `[..., V]`; None if columns are not adjacent, or the rows are not two nested loops."""
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


def strided_rows(x: Tensor, largest: MaxBlock) -> tuple[Tensor, RowStrides, Block]:
    """x, or a contiguous copy if its rows have no strides; the strides of its rows, and the block for them."""
    strides = row_strides(x)
    if strides is None:
        x, strides = x.contiguous(), RowStrides(x.shape[:-1].numel(), 0, x.shape[-1])
    return x, strides, block_for(x.shape[-1], x.element_size(), *strides[1:], largest=largest)


def per_row(x: Tensor) -> Tensor:
    """x, flat and contiguous. Gradients, targets and masks may come expanded (stride 0)."""
    return x.reshape(-1).contiguous()


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def row_address(row, inner, outer_stride, inner_stride):
    row = row.to(tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _fold(x, factor, shift, off, moment, MOMENT: tl.constexpr):
    """Add a block to each thread's online softmax."""
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
    offset = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR) + tl.arange(0, VECTOR)[None, None, :]
    x_target = tl.load(row_ptr + target).to(DTYPE)
    shift = tl.full([THREADS], LOWEST, DTYPE)
    off = tl.zeros([THREADS], DTYPE)
    moment = tl.zeros([THREADS], DTYPE)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(row_ptr + (start + thread + offset), eviction_policy="evict_first").to(DTYPE)
        if (target >= start) & (target < start + BLOCK):
            x = tl.where(offset == target - start - thread, float("-inf"), x)
        shift, off, moment = _fold(x, factor, shift, off, moment, MOMENT)
    if whole < columns:
        at = whole + thread + offset
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
    # From the odds against the target where p_y > 1/2, so that 1 - p_y is not computed as 1 minus p_y.
    likely = e_target > sum_off
    odds = tl.where(likely, sum_off, 0.0) / tl.where(likely, e_target, 1.0)
    logprob = tl.where(likely, -log1p(odds), below * LN2 - log_sum)
    entropy = total * 0.0
    if MOMENT:
        # Both terms are of the size of 1 - p_y near p_y = 1, as the entropy is.
        sum_moment = tl.sum((moment + off * moved) * keep, axis=0)
        target_term = tl.where(e_target > 0.0, -e_target * tl.where(e_target > 0.0, logprob, 0.0), 0.0)
        entropy = (target_term + sum_off * log_sum - LN2 * sum_moment) / total
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
    """The row's target, clamped to an address inside the row."""
    target = tl.load(target_ptr + row).to(tl.int64)
    tl.device_assert((target >= 0) & (target < columns), "targets holds an id outside of the vocabulary")
    return tl.minimum(tl.maximum(target, 0), columns - 1).to(tl.int32)
