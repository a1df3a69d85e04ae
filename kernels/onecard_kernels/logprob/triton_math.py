"""tanh, log1p and log to full precision, which Triton does not have."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh to two units in the last place, for small and for large |x|."""
    t = tl.exp(-2.0 * tl.abs(x))
    s = x * x
    odd = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
    near = x + x * s * (odd - 3.33332819422e-1)
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(x < 0.0, -far, far)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 of fp32 or fp64, by 2 atanh(x / (2 + x)) where 1 + x would round x away."""
    TERMS: tl.constexpr = 12 if x.dtype == tl.float64 else 6  # the next one would be below a hundredth of an ulp
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / (2 * TERMS - 3) + q * (1.0 / (2 * TERMS - 1))
    for i in tl.static_range(2, TERMS):
        series = 1.0 / (2 * (TERMS - i) - 1) + q * series
    return tl.where(x < 0.5, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def log(x):
    """log x for x >= 1. Near 1 the hardware's log has an absolute error of 2^-22, so log1p is used there."""
    return tl.where(x < 1.5, log1p(x - 1.0), tl.log(x))
