"""token_kl: estimators of KL(pi || ref) from one sampled token, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..records import result_dtype

LOG_RATIO_LIMIT = 20.0  # e^20 is 5e8 nats: a larger k3 tells nothing more, and overflows fp32 at 89


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(pi || ref) for tokens sampled from pi.

    d = logp - ref_logp
    k1 = d                  unbiased, can be negative
    k2 = d^2 / 2            biased, never negative; its gradient is an unbiased estimate of the KL's
    k3 = exp(-d) - 1 + d    unbiased, never negative

    "Approximating KL Divergence", Schulman, 2020, http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: `[...]`, the policy's log-probabilities, in nats.
        ref_logprobs: `[...]`, the reference's.
        estimator: "k1", "k2" or "k3".

    Returns:
        fp32 `[...]` in nats (fp64 if either input is). `-inf - -inf` counts as d = 0, with no gradient. In k3 d is
        clamped to +-20 with zero gradient outside, so that log-ratios of +-200 are finite. k1 and k2 are not clamped.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.floating("logprobs", logprobs)
    checks.floating("ref_logprobs", ref_logprobs)
    checks.shape("ref_logprobs", ref_logprobs, logprobs.shape, "the shape of logprobs")
    checks.device("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.one_of("estimator", estimator, ESTIMATORS)
    checks.no_nan("logprobs", logprobs)
    checks.no_nan("ref_logprobs", ref_logprobs)
    return ESTIMATORS[estimator](log_ratio(logprobs, ref_logprobs))


def log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """logprobs - ref_logprobs in fp32 (fp64 if either is), with -inf - -inf = 0 and no NaN in its gradient."""
    dtype = result_dtype(logprobs.dtype, ref_logprobs.dtype)
    both = (logprobs == float("-inf")) & (ref_logprobs == float("-inf"))
    return torch.where(both, 0.0, logprobs.to(dtype) - ref_logprobs.to(dtype))


def _k1(d: Tensor) -> Tensor:
    return d


def _k2(d: Tensor) -> Tensor:
    return 0.5 * d.square()


def _k3(d: Tensor) -> Tensor:
    d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-d) + d  # exp(-d) - 1 would lose all of d^2 / 2 below d = 3e-4


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def _k1_slope(d: Tensor) -> Tensor:
    return torch.ones_like(d)


def _k2_slope(d: Tensor) -> Tensor:
    return d


def _k3_slope(d: Tensor) -> Tensor:
    return torch.where(d.abs() <= LOG_RATIO_LIMIT, -torch.expm1(-d), 0.0)


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1_slope, "k2": _k2_slope, "k3": _k3_slope}
