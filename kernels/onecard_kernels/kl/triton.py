"""KL of rows of logits in Triton: a program reads a row of each model's logits and writes the KL and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logprob.triton_math import log
from ..logprob.triton_tiled import NEVER, alive, flags, scales, transform
from ..records import Head

BLOCK = 4096
WARPS = 8


def kl_pass_(z: Tensor, r: Tensor, head: Head, *, ref_bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """KL(pi || ref) of each row, and where `out` is given dKL/dz there; nothing else is written.

    p = softmax(Head(z));  q = softmax(Head(r));  d_v = log p_v - log q_v
    KL = sum_v p_v (exp(-d_v) - 1 + d_v);  dKL/dz_v = p_v (d_v - KL) dHead/dz_v

    The sum is that of the definition, sum_v p_v d_v, plus 0 = sum_v q_v - p_v. No term is negative, so nothing cancels
    when the policy is near the reference, and an error common to all d_v changes the sum in second order only.

    Args:
        z, r: fp32 `[n, V]` with unit stride along V, hidden states times weight, for policy and reference.
        head: the transform between product and softmax; its bias is the policy's, the rest is for both.
        ref_bias: `[V]`, the reference's bias, or None.
        out: `[n, V]` with unit stride along V, of any floating point dtype; `z` itself may be given.

    Returns:
        fp32 `[n]` in nats; infinite, with gradient 0, where the reference excludes a token that the policy does not.

    Raises:
        TypeError: if z or r is not fp32. ValueError: for another shape or stride.
    """
    for name, tensor in (("z", z), ("r", r)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.float32")
    for name, rows in (("r", r), ("out", z if out is None else out)):
        if rows.shape != z.shape:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected {tuple(z.shape)}, the shape of z")
    for name, rows in (("z", z), ("r", r), ("out", z if out is None else out)):
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            raise ValueError(f"{name} has stride {rows.stride(1)} along the vocabulary, expected 1")
    n, v = z.shape
    kl = z.new_empty(n)
    if n == 0:
        return kl
    inner, outer = scales(head)
    target = z if out is None else out
    # With a softcap and no forbidden tokens, a whole block spills registers on Blackwell
    # (`python -m benchmarks.cards --kernel kl`).
    most = BLOCK // 2 if head.softcap is not None and head.forbidden is None else BLOCK
    block = min(most, triton.next_power_of_2(v))
    with torch.cuda.device_of(z):
        _kl_kernel[(n,)](
            z,
            r,
            target,
            kl,
            kl if head.bias is None else head.bias.contiguous(),
            kl if ref_bias is None else ref_bias.contiguous(),
            kl if head.forbidden is None else head.forbidden.contiguous().view(torch.uint8),
            z.stride(0),
            r.stride(0),
            target.stride(0),
            inner,
            outer,
            head.factor,
            v,
            num_warps=max(1, min(WARPS, block // 256)),
            num_stages=2,
            BLOCK=block,
            WRITE=out is not None,
            REF_BIAS=ref_bias is not None,
            **flags(head),
        )
    return kl


@triton.jit
def excess(d):
    """exp(-d) - 1 + d for |d| < 1, by its series: as a difference, d^2 / 2 would be rounded away at small d."""
    s = 2.75573192e-7 - d * 2.50521084e-8
    s = 2.75573192e-6 - d * s
    s = 2.48015873e-5 - d * s
    s = 1.98412698e-4 - d * s
    s = 1.38888889e-3 - d * s
    s = 8.33333333e-3 - d * s
    s = 4.16666667e-2 - d * s
    s = 1.66666667e-1 - d * s
    return d * d * (0.5 - d * s)


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)^2, right to a few units in the last place also where tanh is nearly 1."""
    t = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def _load(
    row, bias, cols, live, vocabulary, inner, outer, BIAS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr
):
    """(transformed logits of one block, products plus bias before the transform)"""
    raw = tl.load(row + cols, mask=cols < vocabulary, other=0.0)
    shift = 0.0
    if BIAS:
        shift = tl.load(bias + cols, mask=cols < vocabulary, other=0.0).to(tl.float32)
    return transform(raw, shift, live, inner, outer, BIAS, SCALED, SOFTCAP), raw + shift


@triton.jit
def _kl_kernel(
    z,
    r,
    out,
    kl,
    bias,
    ref_bias,
    forbidden,
    z_row,
    r_row,
    out_row,
    inner,
    outer,
    factor,
    vocabulary,
    BLOCK: tl.constexpr,
    WRITE: tl.constexpr,
    REF_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORBIDDEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_row
    r += row * r_row
    out += row * out_row
    lane = tl.arange(0, BLOCK)

    top_p = tl.full((), NEVER, tl.float32)
    top_q = tl.full((), NEVER, tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    sum_q = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        cols = start + lane
        live = alive(forbidden, cols, vocabulary, FORBIDDEN)
        a, _ = _load(z, bias, cols, live, vocabulary, inner, outer, BIAS, SCALED, SOFTCAP)
        b, _ = _load(r, ref_bias, cols, live, vocabulary, inner, outer, REF_BIAS, SCALED, SOFTCAP)
        higher_p = tl.maximum(top_p, tl.max(a, 0))
        higher_q = tl.maximum(top_q, tl.max(b, 0))
        sum_p = sum_p * tl.exp(top_p - higher_p) + tl.exp(a - higher_p)
        sum_q = sum_q * tl.exp(top_q - higher_q) + tl.exp(b - higher_q)
        top_p, top_q = higher_p, higher_q
    total_p, total_q = tl.sum(sum_p, 0), tl.sum(sum_q, 0)
    scale_p, scale_q = 1.0 / total_p, 1.0 / total_q
    shift = (top_p - top_q) + (log(total_p) - log(total_q))

    sum_p = tl.zeros((BLOCK,), tl.float32)
    sum_excess = tl.zeros((BLOCK,), tl.float32)
    sum_d = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        cols = start + lane
        live = alive(forbidden, cols, vocabulary, FORBIDDEN)
        a, _ = _load(z, bias, cols, live, vocabulary, inner, outer, BIAS, SCALED, SOFTCAP)
        b, _ = _load(r, ref_bias, cols, live, vocabulary, inner, outer, REF_BIAS, SCALED, SOFTCAP)
        p, q = tl.exp(a - top_p) * scale_p, tl.exp(b - top_q) * scale_q
        d = (a - b) - shift
        pd = tl.where(p == 0.0, 0.0, p * d)
        # Where d is large, p may have underflowed to 0 while q has not, so q is not computed as p exp(-d).
        sum_excess += tl.where(tl.abs(d) < 1.0, p * excess(d), q - p + pd)
        sum_d += pd
        sum_p += p
    divergence = tl.sum(sum_excess, 0)
    tl.store(kl + row, divergence)

    if WRITE:
        # The mean of the same rounded d and p: their common rounding error cancels in d - mean.
        mean = tl.sum(sum_d, 0) / tl.sum(sum_p, 0)
        scale_p = tl.where(mean == float("inf"), 0.0, scale_p)
        for start in range(0, vocabulary, BLOCK):
            cols = start + lane
            live = alive(forbidden, cols, vocabulary, FORBIDDEN)
            a, raw = _load(z, bias, cols, live, vocabulary, inner, outer, BIAS, SCALED, SOFTCAP)
            b, _ = _load(r, ref_bias, cols, live, vocabulary, inner, outer, REF_BIAS, SCALED, SOFTCAP)
            p = tl.exp(a - top_p) * scale_p
            g = p * (((a - b) - shift) - mean) * factor
            if SOFTCAP:
                g *= tanh_slope(raw * inner)
            g = tl.where(p == 0.0, 0.0, g)
            tl.store(out + cols, g.to(out.dtype.element_ty), mask=cols < vocabulary)
