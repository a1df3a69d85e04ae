"""The pass over a tile of products with the head in Triton: transform, online softmax, exponentials.

One program takes one row and reads the tile once. The shift is chosen before that, from the first block and the target.
Later tiles keep the shift of earlier ones. All sums and results use that shift. If a logit is more than the limit above
it, the row is read again with a higher shift. So no sum in the loop is rescaled, and results are at most e^limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Head
from . import online_softmax as slots
from .online_softmax import TileOutputs
from .triton_row_parts import FAR, LOWEST, MaxBlock, block_for, per_row
from .triton_tiled import scales

SHIFT = tl.constexpr(slots.SHIFT)
OFF = tl.constexpr(slots.OFF)
TARGET = tl.constexpr(slots.TARGET)
SLOPE = tl.constexpr(slots.SLOPE)
MOMENT = tl.constexpr(slots.MOMENT)
SQUARE = tl.constexpr(slots.SQUARE)
RESCALE = tl.constexpr(slots.RESCALE)

# How far a logit may be above the shift. e^(2 * 20) times a vocabulary is far below the largest fp32 (and bf16) number.
# The largest fp16 number is 65504, and 8 e^8 is below it.
LIMIT = 20.0
LIMIT_FP16 = 8.0

MAX_BLOCK = MaxBlock()


@triton.jit
def _transform(
    x,
    at,
    inside,
    bias_ptr,
    forbidden_ptr,
    inner,
    outer,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    FORBIDDEN: tl.constexpr,
):
    """Head.transform, and 1 - tanh^2 (1 without a softcap). `inner`, `outer`: see `scales`."""
    if BIAS:
        x += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x *= inner
    slope = x * 0.0 + 1.0
    if CAP:
        q = tl.exp(-2.0 * tl.abs(x))
        slope = 4.0 * q / ((1.0 + q) * (1.0 + q))
        size = outer * ((1.0 - q) / (1.0 + q))
        x = tl.where(x < 0.0, -size, size)
    if FORBIDDEN:
        x = tl.where(tl.load(forbidden_ptr + at, mask=inside, other=0) != 0, float("-inf"), x)
    return x, slope


@triton.jit
def _top(
    z_row,
    bias_ptr,
    forbidden_ptr,
    columns,
    inner,
    outer,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The largest of the first `columns` logits."""
    at_first = _columns(UNROLL, THREADS, VECTOR)
    top = tl.full([THREADS], float("-inf"), tl.float32)
    for start in range(0, columns, UNROLL * THREADS * VECTOR):
        at = start + at_first
        x = tl.load(z_row + at, mask=at < columns, other=0.0)
        z, _ = _transform(x, at, at < columns, bias_ptr, forbidden_ptr, inner, outer, BIAS, CAP, FORBIDDEN)
        z = tl.where(at < columns, z, float("-inf"))
        top = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0))
    return tl.max(top, axis=0)


@triton.jit
def _columns(UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    block = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR)
    return block + tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _exp_row(
    z_row,
    out_row,
    entropy_term_row,
    bias_ptr,
    forbidden_ptr,
    target,
    columns,
    shift,
    inner,
    outer,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    WRITE: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the row's results with `shift`. Returns its largest logit and its three sums, without the target's."""
    at_first = _columns(UNROLL, THREADS, VECTOR)
    top = tl.full([THREADS], float("-inf"), tl.float32)
    off = tl.zeros([THREADS], tl.float32)
    moment = tl.zeros([THREADS], tl.float32)
    square = tl.zeros([THREADS], tl.float32)
    for start in range(0, columns, UNROLL * THREADS * VECTOR):
        at = start + at_first
        inside = at < columns
        x = tl.load(z_row + at, mask=inside, other=0.0)
        z, slope = _transform(x, at, inside, bias_ptr, forbidden_ptr, inner, outer, BIAS, CAP, FORBIDDEN)
        z = tl.where(inside & (at != target), z, float("-inf"))
        d = z - shift
        e = tl.exp(d)
        entropy_term = e * tl.where(d < FAR, FAR, d)
        top = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0))
        off += tl.sum(tl.sum(e, axis=2), axis=0)
        moment += tl.sum(tl.sum(entropy_term, axis=2), axis=0)
        square += tl.sum(tl.sum(e * e, axis=2), axis=0)
        if CAP:
            e *= slope
            entropy_term *= slope
        if WRITE:
            tl.store(out_row + at, e.to(out_row.dtype.element_ty), mask=inside)
        if ENTROPY_TERM:
            tl.store(entropy_term_row + at, entropy_term.to(entropy_term_row.dtype.element_ty), mask=inside)
    return tl.max(top, axis=0), tl.sum(off, axis=0), tl.sum(moment, axis=0), tl.sum(square, axis=0)


@triton.jit
def _exp_kernel(
    z_ptr,
    out_ptr,
    entropy_term_ptr,
    target_ptr,
    state_ptr,
    bias_ptr,
    forbidden_ptr,
    first,
    columns,
    z_stride,
    out_stride,
    entropy_term_stride,
    state_stride,
    inner,
    outer,
    limit,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    WRITE: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    out_row = out_ptr + row * out_stride
    entropy_term_row = entropy_term_ptr + row * entropy_term_stride
    state = state_ptr + row
    target = tl.load(target_ptr + row).to(tl.int64) - first
    here = (target >= 0) & (target < columns)
    target = tl.where(here, target, -1).to(tl.int32)
    old = tl.load(state + SHIFT * state_stride)
    z_target = tl.load(state + TARGET * state_stride)
    slope_target = tl.load(state + SLOPE * state_stride)
    if here:
        x_target = tl.load(z_row + target)
        z_target, slope_target = _transform(
            x_target, target, target >= 0, bias_ptr, forbidden_ptr, inner, outer, BIAS, CAP, FORBIDDEN
        )
    shift = tl.maximum(old, LOWEST)
    if IN_PLACE:
        tl.debug_barrier()  # every warp has read the target's logit before any warp writes over it
        top = _top(z_row, bias_ptr, forbidden_ptr, columns, inner, outer, BIAS, CAP, FORBIDDEN, UNROLL, THREADS, VECTOR)
        top = tl.maximum(top, z_target)
        if top > shift + limit:
            shift = top
    elif old == float("-inf"):
        sample = tl.minimum(columns, UNROLL * THREADS * VECTOR)
        top = _top(z_row, bias_ptr, forbidden_ptr, sample, inner, outer, BIAS, CAP, FORBIDDEN, UNROLL, THREADS, VECTOR)
        shift = tl.maximum(tl.maximum(top, z_target), LOWEST)
    line = (z_row, out_row, entropy_term_row, bias_ptr, forbidden_ptr, target, columns)
    highest, off, moment, square = _exp_row(
        *line, shift, inner, outer, BIAS, CAP, FORBIDDEN, WRITE, ENTROPY_TERM, UNROLL, THREADS, VECTOR
    )
    if not IN_PLACE:
        highest = tl.maximum(highest, z_target)
        if highest > shift + limit:
            shift = highest
            highest, off, moment, square = _exp_row(
                *line, shift, inner, outer, BIAS, CAP, FORBIDDEN, WRITE, ENTROPY_TERM, UNROLL, THREADS, VECTOR
            )
    # sum e (z - new) = rescale * (sum e (z - old) + (old - new) sum e)
    moved = tl.where(old == float("-inf"), 0.0, tl.maximum(old, LOWEST) - shift)
    rescale = tl.exp(moved)
    old_off = tl.load(state + OFF * state_stride)
    old_moment = tl.load(state + MOMENT * state_stride) + moved * old_off
    old_square = tl.load(state + SQUARE * state_stride)
    tl.store(state + OFF * state_stride, old_off * rescale + off)
    tl.store(state + MOMENT * state_stride, old_moment * rescale + moment)
    tl.store(state + SQUARE * state_stride, old_square * rescale * rescale + square)
    tl.store(state + RESCALE * state_stride, rescale)
    # only -inf so far: the next tile chooses the shift
    tl.store(state + SHIFT * state_stride, tl.where(shift == LOWEST, float("-inf"), shift))
    tl.store(state + TARGET * state_stride, z_target)
    tl.store(state + SLOPE * state_stride, slope_target)


def exp_tile(
    z: Tensor,
    out: Tensor,
    entropy_term: Tensor | None,
    y: Tensor,
    first: int,
    state: Tensor,
    head: Head,
    outputs: TileOutputs,
) -> None:
    """Add the columns from `first` on to `state`; write e_v to `out` and e_v (z_v - shift) to `entropy_term`.

    z: `[n, c]` fp32 products h @ W.T of one tile; kept, unless `out` is z. out: z, or `[n, c]` of another dtype,
    written if `outputs.exponentials`. entropy_term: None, or `[n, c]` of any dtype. Both are 0 at the target and times
    the softcap's slope. y: `[n]`, ids in the whole vocabulary. state: fp32 `[SLOTS, n]`. head: its bias and forbidden
    columns are the tile's. z, out and entropy_term have their columns side by side, and any row strides. No autograd.
    """
    rows, columns = z.shape
    if rows == 0:
        return
    in_place = outputs.exponentials and out.dtype == z.dtype and out.data_ptr() == z.data_ptr()
    cap = head.softcap
    block = block_for(columns, z.element_size(), z.stride(0), largest=MAX_BLOCK)
    # More numbers per logit need more registers: fewer logits at a time.
    extras = (head.bias is not None, head.forbidden is not None, cap is not None or entropy_term is not None, in_place)
    fuller = sum(extras) - (sum(extras) > 1 and block.vector > 1)
    inner, outer = scales(head)
    half = torch.float16 in (out.dtype, z.dtype if entropy_term is None else entropy_term.dtype)
    with torch.cuda.device_of(z):
        _exp_kernel[(rows,)](
            z,
            out,
            z if entropy_term is None else entropy_term,
            per_row(y),
            state,
            z if head.bias is None else head.bias,
            z if head.forbidden is None else head.forbidden,
            first,
            columns,
            z.stride(0),
            out.stride(0),
            0 if entropy_term is None else entropy_term.stride(0),
            state.stride(0),
            inner,
            outer,
            LIMIT_FP16 if half else LIMIT,
            BIAS=head.bias is not None,
            CAP=cap is not None,
            FORBIDDEN=head.forbidden is not None,
            WRITE=outputs.exponentials,
            ENTROPY_TERM=entropy_term is not None,
            IN_PLACE=in_place,
            **block._replace(unroll=max(1, block.unroll >> fuller)).options(),
        )
