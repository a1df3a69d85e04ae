"""The plain formulas that tests and benchmarks compare with, in the inputs' own dtype, with whole logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from onecard_kernels import Advantages, LogProbs, Loss
from onecard_kernels.kl.token_kl import ESTIMATORS, LOG_RATIO_LIMIT, log_ratio
from onecard_kernels.ppo.options import PolicyOptions, PolicyTokens, dtype_of
from onecard_kernels.records import Head, divisor_of, result_dtype


def selective_log_softmax(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    entropy_requires_grad: bool = False,
    return_log_sum_sq_probs: bool = False,
) -> LogProbs:
    """log softmax(logits / temperature)[targets], its entropy, and log sum_v p_v^2."""
    valid = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
    dtype = result_dtype(logits.dtype)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logp.gather(-1, targets.long().masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    # A target without any probability is a constant -inf: it has no gradient, rather than one towards nothing.
    chosen = chosen.masked_fill(chosen == float("-inf"), float("-inf"))

    def out(value: Tensor) -> Tensor:
        return value.to(dtype).masked_fill(~valid, 0.0)

    entropy = lssp = None
    if return_entropy or entropy_requires_grad:
        held = logp if entropy_requires_grad else logp.detach()
        held = held.masked_fill(held == float("-inf"), 0.0)  # p log p is 0 at p = 0
        p = logp.exp() if entropy_requires_grad else logp.detach().exp()
        entropy = out(-(p * held).sum(-1))
    if return_log_sum_sq_probs:
        lssp = out(torch.logsumexp(2 * logp.detach(), dim=-1))
    return LogProbs(out(chosen), entropy, lssp)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    entropy_requires_grad: bool = False,
    return_log_sum_sq_probs: bool = False,
) -> LogProbs:
    """The same of the head's logits, `Head.transform(hidden @ weight.T)`."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = Head(bias, temperature, logit_scale, softcap, forbidden).transform(hidden.to(dtype) @ weight.to(dtype).T)
    return selective_log_softmax(
        logits,
        targets,
        mask=mask,
        return_entropy=return_entropy,
        entropy_requires_grad=entropy_requires_grad,
        return_log_sum_sq_probs=return_log_sum_sq_probs,
    )


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


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, last_values: Tensor | None
) -> Advantages:
    valid = mask.bool()
    dtype = result_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    rewards, values = (torch.where(valid, x.to(dtype), 0.0) for x in (rewards, values))
    last = values.new_zeros(values.shape[0]) if last_values is None else last_values.to(dtype)

    following = torch.cat([values, last.unsqueeze(1)], dim=1).gather(1, _next_valid(valid))
    deltas = torch.where(valid, rewards + gamma * following - values, 0.0)
    # One operation a step: a masked position adds nothing and hands the carry on undiminished.
    decays = torch.ones_like(values).masked_fill(valid, gamma * lam)
    carry = torch.zeros_like(last)
    steps = []
    for delta, decay in zip(reversed(deltas.unbind(1)), reversed(decays.unbind(1)), strict=True):
        carry = torch.addcmul(delta, decay, carry)
        steps.append(carry)
    advantages = torch.stack(steps[::-1], dim=1) if steps else deltas
    advantages = torch.where(valid, advantages, 0.0)
    return Advantages(advantages, advantages + values)


def _next_valid(valid: Tensor) -> Tensor:
    """For each position, that of the row's next valid one after it; T where there is none."""
    length = valid.shape[1]
    here = torch.where(valid, torch.arange(length, device=valid.device), length)
    from_here = torch.cat([here, here.new_full((valid.shape[0], 1), length)], dim=1).flip(1).cummin(1).values.flip(1)
    return from_here[:, 1:]
