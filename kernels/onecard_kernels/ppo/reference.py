"""The plain formulas of PPO's losses, in fp32 or fp64. Arguments are checked by the callers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kl.reference import ESTIMATORS, LOG_RATIO_LIMIT, log_ratio
from ..records import Loss, divisor_of
from .options import PolicyOptions, PolicyTokens, dtype_of


class _Valid:
    """The tokens that count.

    Masked tokens may hold NaN, and NaN * 0 is NaN in the value and in the gradient: they are replaced before any
    arithmetic, not multiplied away after it.
    """

    def __init__(self, mask: Tensor, dtype: torch.dtype, normalizer: float | Tensor | None) -> None:
        self.mask = mask.bool()
        self.dtype = dtype
        self.divisor = divisor_of(normalizer, self.mask.sum().clamp(min=1), self.dtype)

    def keep(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x.to(self.dtype), 0.0)

    def constant(self, x: Tensor) -> Tensor:
        return self.keep(x.detach())

    def mean(self, x: Tensor) -> Tensor:
        return self.keep(x).sum() / self.divisor

    def metric(self, x: Tensor) -> Tensor:
        return self.mean(x.detach())


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    normalizer: float | Tensor | None,
) -> Loss:
    valid = _Valid(tokens.mask, tokens.dtype_with(logprobs, entropy), normalizer)
    logp, a = valid.keep(logprobs), valid.constant(tokens.advantages)

    old = logp.detach() if tokens.old_logprobs is None else valid.constant(tokens.old_logprobs)
    d = log_ratio(logp, old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = d.exp()
    free, clipped = -a * ratio, -a * ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    losses = torch.maximum(free, clipped)
    if options.dual_clip is not None:
        losses = torch.where(a < 0, torch.minimum(losses, -options.dual_clip * a), losses)
    metrics = {
        "policy/approxkl": valid.metric(0.5 * d.square()),
        "policy/clipfrac": valid.metric(clipped > free),
        "val/ratio": valid.metric(ratio),
    }

    # A term that is off is left out: times 0, an infinite KL or entropy would be NaN.
    if entropy is not None:
        metrics["policy/entropy"] = valid.metric(entropy)
        if options.entropy_in_loss:
            losses = losses - options.entropy_coef * valid.keep(entropy)
    if tokens.ref_logprobs is not None:
        policy = logp if options.kl_in_loss else logp.detach()
        kl = ESTIMATORS[options.kl_estimator](log_ratio(policy, valid.constant(tokens.ref_logprobs)))
        metrics["policy/kl"] = valid.metric(kl)
        if options.kl_in_loss:
            losses = losses + options.kl_coef * kl

    if tokens.weights is not None:
        losses = losses * valid.constant(tokens.weights)
    return Loss(valid.mean(losses), metrics)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> Loss:
    valid = _Valid(mask, dtype_of(values, old_values, returns, weights), normalizer)
    v, target = valid.keep(values), valid.constant(returns)
    losses, metrics = (v - target).square(), {}
    if clip is not None and old_values is not None:
        old = valid.constant(old_values)
        # old + clamp(v - old, -clip, clip) differs from v by rounding inside the range, and would count as clipped.
        clipped = (v.clamp(old - clip, old + clip) - target).square()
        metrics["val/clipfrac"] = valid.metric(clipped > losses)
        losses = torch.maximum(losses, clipped)
    losses = 0.5 * losses
    if weights is not None:
        losses = losses * valid.constant(weights)
    return Loss(valid.mean(losses), metrics)
