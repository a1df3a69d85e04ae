"""How tests compare: against fp64 truth, by the error that plain eager arithmetic of the same dtype makes there.

A constant tolerance says nothing about a kernel: it is either looser than the error of the code it replaces or tighter
than the dtype allows. So a gradient may be at most twice as wrong as eager is on the same inputs, and values keep the
library's stated tolerances.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tolerances on |logp - fp64|, by input dtype and standard deviation of the logits.
LOGPROB_TOLERANCES = {
    (torch.bfloat16, 4): 1e-4,
    (torch.float16, 4): 1e-4,
    (torch.float32, 4): 2e-5,
    (torch.float32, 30): 1e-4,
}
FLOOR_ULPS = 4.0


def error(got: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinities must be the same on both sides, NaN is never right."""
    got, truth = got.detach().double(), truth.detach().double()
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert not got.isnan().any(), f"{int(got.isnan().sum())} NaN"
    infinite = truth.isinf()
    assert torch.equal(got[infinite], truth[infinite]), "infinities differ"
    assert torch.equal(got.isinf(), infinite), "infinities differ"
    difference = (got - truth)[~infinite].abs()
    return float(difference.max()) if difference.numel() else 0.0


def floor(truth: Tensor, dtype: torch.dtype) -> float:
    """A few units in the last place of the largest true value: eager can be exact by luck."""
    finite = truth.detach()[truth.detach().isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return FLOOR_ULPS * torch.finfo(dtype).eps * max(scale, torch.finfo(dtype).tiny)


def assert_within(got: Tensor, truth: Tensor, tolerance: float, what: str = "value") -> None:
    off = error(got, truth)
    assert off <= tolerance, f"{what}: off by {off:.3g}, tolerance {tolerance:.3g}"


def assert_like_eager(got: Tensor, eager: Tensor, truth: Tensor, what: str = "gradient", factor: float = 2.0) -> None:
    """At most `factor` times the error of `eager`, the same-dtype eager result."""
    tolerance = factor * error(eager, truth) + floor(truth, got.dtype)
    assert_within(got, truth, tolerance, what)
