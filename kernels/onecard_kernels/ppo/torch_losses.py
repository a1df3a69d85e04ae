"""PPO's losses in torch, in fp32 or fp64. Arguments are checked by the callers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kl.token_kl import ESTIMATORS, LOG_RATIO_LIMIT, SLOPES, log_ratio
from ..records import Loss, divisor_of
from .options import PolicyOptions, PolicyTerms, PolicyTokens, dtype_of, metrics_of


def policy_terms(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    *,
    needs_slope: bool = True,
) -> PolicyTerms:
    """The sums of the clipped policy loss and its metrics; its derivatives, for losses that need them in the forward.

    Masked tokens may be NaN, and NaN * 0 is NaN in the value and in the gradient. So they are replaced by 0 before any
    arithmetic. A term whose coefficient is 0 is left out: 0 times an infinite KL would be NaN.

    The sums have a gradient by autograd. The derivatives are formulas.
    """
    dtype, valid = tokens.dtype_with(logprobs, entropy), tokens.mask.bool()

    def masked(x: Tensor) -> Tensor:
        return torch.where(valid, x.to(dtype), 0.0)

    def constant(x: Tensor) -> Tensor:
        return masked(x.detach())

    logp, a = masked(logprobs), constant(tokens.advantages)
    log_ratios = log_ratio(logp, logp.detach() if tokens.old_logprobs is None else constant(tokens.old_logprobs))
    d = log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = d.exp()
    unclipped, clipped = -a * ratio, -a * ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    surrogate = losses = torch.maximum(unclipped, clipped)
    if options.dual_clip is not None:
        losses = torch.where(a < 0, torch.minimum(losses, -options.dual_clip * a), losses)
    kl = ref_log_ratio = None
    if tokens.ref_logprobs is not None:
        ref_log_ratio = log_ratio(logp if options.kl_in_loss else logp.detach(), constant(tokens.ref_logprobs))
        kl = ESTIMATORS[options.kl_estimator](ref_log_ratio)
        if options.kl_in_loss:
            losses = losses + options.kl_coef * kl
    if entropy is not None and options.entropy_in_loss:
        losses = losses - options.entropy_coef * masked(entropy)
    weights = None if tokens.weights is None else constant(tokens.weights)
    zero = logp.new_zeros(())
    sums = torch.stack((
        (losses if weights is None else losses * weights).sum(),
        masked(0.5 * d.detach().square()).sum(),
        masked(clipped > unclipped).sum(),
        masked(ratio.detach()).sum(),
        zero if entropy is None else constant(entropy).sum(),
        zero if kl is None else constant(kl).sum(),
        valid.sum().to(dtype),
    ))  # fmt: skip
    slope = entropy_slope = logp.new_empty(0)
    if needs_slope:
        slope = torch.where((clipped <= unclipped) & (log_ratios.abs() <= LOG_RATIO_LIMIT), unclipped, 0.0)
        if options.dual_clip is not None:
            slope = torch.where((a < 0) & (surrogate > -options.dual_clip * a), 0.0, slope)
        if ref_log_ratio is not None and options.kl_in_loss:
            slope = slope + options.kl_coef * SLOPES[options.kl_estimator](ref_log_ratio)
        slope = slope.masked_fill(logp.isinf(), 0.0)  # a token of probability 0 has no gradient
        factor = torch.where(valid, 1.0, 0.0).to(dtype) if weights is None else weights
        slope = slope * factor
        if entropy is not None and options.entropy_in_loss:
            entropy_slope = -options.entropy_coef * factor
    return PolicyTerms(sums, slope, entropy_slope)


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    normalizer: float | Tensor | None,
) -> Loss:
    sums = policy_terms(logprobs, entropy, tokens, options, needs_slope=False).totals
    totals = sums / divisor_of(normalizer, sums[-1].detach().clamp(min=1.0), sums.dtype)
    kl = tokens.ref_logprobs is not None
    return Loss(totals[0], metrics_of(totals[1:].detach(), entropy=entropy is not None, kl=kl))


def logits_ppo_loss(
    logits: Tensor,
    targets: Tensor,
    tokens: PolicyTokens,
    options: PolicyOptions,
    temperature: float,
    normalizer: float | Tensor | None,
) -> Loss:
    logprobs, entropy, _ = torch.ops.onecard.selective_forward(logits, targets, tokens.mask, temperature, True, "torch")
    return ppo_loss(logprobs, entropy if options.entropy_in_loss else entropy.detach(), tokens, options, normalizer)


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
    dtype, valid = dtype_of(values, old_values, returns, weights), mask.bool()
    divisor = divisor_of(normalizer, valid.sum().clamp(min=1), dtype)

    def masked(x: Tensor) -> Tensor:
        return torch.where(valid, x.to(dtype), 0.0)

    v, target = masked(values), masked(returns.detach())
    losses, metrics = (v - target).square(), {}
    if clip is not None and old_values is not None:
        old = masked(old_values.detach())
        # old + clamp(v - old, -clip, clip) is not exactly v inside the range, and would count as clipped.
        clipped = (v.clamp(old - clip, old + clip) - target).square()
        metrics["val/clipfrac"] = masked((clipped > losses).detach()).sum() / divisor
        losses = torch.maximum(losses, clipped)
    losses = 0.5 * losses
    if weights is not None:
        losses = losses * masked(weights.detach())
    return Loss(masked(losses).sum() / divisor, metrics)
