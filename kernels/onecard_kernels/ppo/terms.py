"""PPO's policy loss token by token, its derivatives written out: for a loss that forms gradients in its forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kl.reference import ESTIMATORS, LOG_RATIO_LIMIT, log_ratio
from .options import PolicyOptions, PolicyTokens

SUMS = ("loss", "policy/approxkl", "policy/clipfrac", "val/ratio", "policy/entropy", "policy/kl", "tokens")


def metrics_of(totals: Tensor, *, entropy: bool, kl: bool) -> dict[str, Tensor]:
    """Those whose inputs were given, of all sums but the loss's over the divisor."""
    absent = {"tokens", *(() if entropy else ("policy/entropy",)), *(() if kl else ("policy/kl",))}
    return {name: x for name, x in zip(SUMS[1:], totals.unbind(), strict=True) if name not in absent}


def ppo_terms(
    logprobs: Tensor, entropy: Tensor | None, tokens: PolicyTokens, options: PolicyOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`ppo_loss` before the division: its sums, in the order of SUMS, and dloss/dlogp and dloss/dentropy per token."""
    dtype, valid = tokens.dtype_with(logprobs, entropy), tokens.mask.bool()

    def keep(x: Tensor) -> Tensor:
        return torch.where(valid, x.to(dtype), 0.0)

    logp, a = keep(logprobs), keep(tokens.advantages)
    raw = log_ratio(logp, logp if tokens.old_logprobs is None else keep(tokens.old_logprobs))
    ratio = raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    free, clipped = -a * ratio, -a * ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    losses = torch.maximum(free, clipped)
    slope = torch.where((clipped <= free) & (raw.abs() <= LOG_RATIO_LIMIT), free, 0.0)
    if options.dual_clip is not None:
        bound = -options.dual_clip * a
        bounded = (a < 0) & (losses > bound)
        losses, slope = torch.where(bounded, bound, losses), torch.where(bounded, 0.0, slope)
    kl = None
    if tokens.ref_logprobs is not None:
        far = log_ratio(logp, keep(tokens.ref_logprobs))
        kl = ESTIMATORS[options.kl_estimator](far)
        if options.kl_in_loss:
            losses = losses + options.kl_coef * kl
            slope = slope + options.kl_coef * _KL_SLOPES[options.kl_estimator](far)
    slope = slope.masked_fill(logp.isinf(), 0.0)  # an impossible token is a constant
    factor = torch.where(valid, 1.0, 0.0).to(dtype) if tokens.weights is None else keep(tokens.weights)
    on_entropy = None
    if entropy is not None and options.entropy_in_loss:
        losses, on_entropy = losses - options.entropy_coef * keep(entropy), -options.entropy_coef * factor
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
