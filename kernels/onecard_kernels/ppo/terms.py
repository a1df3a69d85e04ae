"""PPO's policy loss token by token, its derivatives written out: for a loss that forms gradients in its forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kl.reference import ESTIMATORS, LOG_RATIO_LIMIT, log_ratio
from ..logprob.passes import result_dtype

SUMS = ("loss", "policy/approxkl", "policy/clipfrac", "val/ratio", "policy/entropy", "policy/kl", "tokens")


def ppo_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy: Tensor | None,
    entropy_coef: float,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`ppo_loss` before the division: its sums, in the order of SUMS, and dloss/dlogp and dloss/dentropy per token."""
    given = [x for x in (logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights) if x is not None]
    dtype, valid = result_dtype(*(x.dtype for x in given)), mask.bool()

    def keep(x: Tensor) -> Tensor:
        return torch.where(valid, x.to(dtype), 0.0)

    logp, a = keep(logprobs), keep(advantages)
    raw = log_ratio(logp, keep(old_logprobs))
    ratio = raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    free, clipped = -a * ratio, -a * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.maximum(free, clipped)
    slope = torch.where((clipped <= free) & (raw.abs() <= LOG_RATIO_LIMIT), free, 0.0)
    if dual_clip is not None:
        bounded = (a < 0) & (losses > -dual_clip * a)
        losses, slope = torch.where(bounded, -dual_clip * a, losses), torch.where(bounded, 0.0, slope)
    kl = None
    if ref_logprobs is not None:
        far = log_ratio(logp, keep(ref_logprobs))
        kl = ESTIMATORS[kl_estimator](far)
        if kl_coef != 0.0:
            losses, slope = losses + kl_coef * kl, slope + kl_coef * _KL_SLOPES[kl_estimator](far)
    slope = slope.masked_fill(logp.isinf(), 0.0)  # an impossible token is a constant
    factor = torch.where(valid, 1.0, 0.0).to(dtype) if weights is None else keep(weights)
    on_entropy = None
    if entropy is not None and entropy_coef != 0.0:
        losses, on_entropy = losses - entropy_coef * keep(entropy), -entropy_coef * factor
    zero = logp.new_zeros(())
    sums = (
        (losses * factor).sum(),
        keep(0.5 * raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).square()).sum(),
        keep(clipped > free).sum(),
        keep(ratio).sum(),
        zero if entropy is None else keep(entropy).sum(),
        zero if kl is None else keep(kl).sum(),
        valid.sum().to(dtype),
    )
    return torch.stack(sums), slope * factor, on_entropy


def _k1_slope(d: Tensor) -> Tensor:
    return torch.ones_like(d)


def _k2_slope(d: Tensor) -> Tensor:
    return d


def _k3_slope(d: Tensor) -> Tensor:
    return torch.where(d.abs() <= LOG_RATIO_LIMIT, -torch.expm1(-d), 0.0)


_KL_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1_slope, "k2": _k2_slope, "k3": _k3_slope}
