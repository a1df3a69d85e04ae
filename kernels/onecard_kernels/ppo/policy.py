"""PPO's clipped policy loss from log-probabilities."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from ..records import Loss
from .options import PolicyTokens, policy_options


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> Loss:
    """Clipped policy loss of tokens, from their log-probabilities under the policy that learns and the one that acted.

    d = logp - old_logp;  ratio = e^d;  pg = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))
    with dual_clip c, where A < 0:  pg = min(pg, -c A)
    loss = sum_tokens mask * weight * (pg - entropy_coef * entropy + kl_coef * token_kl(logp, ref_logp)) / normalizer

    "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347. clip_low unlike clip_high: "DAPO",
    https://arxiv.org/abs/2503.14476. dual_clip: "Mastering Complex Control in MOBA Games with Deep Reinforcement
    Learning", https://arxiv.org/abs/1912.09729.

    Args:
        logprobs: `[...]`, the policy's, `[B, T]` or packed `[tokens]`, in nats.
        old_logprobs: `[...]`, those of the policy that sampled the tokens. None: the log-probabilities themselves,
            detached (the policy itself has just sampled them).
        advantages: `[...]`, one per token.
        mask: `[...]`, bool or 0/1. Masked tokens count nowhere and have zero gradient, whatever any input holds there
            (NaN too).
        clip_low: 0 to 1; the ratio is clipped below at 1 - clip_low.
        clip_high: 0 or more; the ratio is clipped above at 1 + clip_high.
        dual_clip: above 1; bounds the loss of a token with a negative advantage and a large ratio. None: no bound.
        entropy: `[...]`, the policy's, in nats; with its gradient if entropy_coef is to have an effect.
        entropy_coef: nats of loss per nat of entropy; not 0 needs entropy.
        ref_logprobs: `[...]`, the reference policy's.
        kl_coef: nats of loss per nat of divergence; not 0 needs ref_logprobs.
        kl_estimator: "k1", "k2" or "k3", see `token_kl`.
        weights: `[...]`, a factor for each token's loss (not for the metrics).
        normalizer: divides the sums of loss and metrics, the mask's sum by default. Given the whole batch's number of
            tokens, micro-batches add up to the batch in loss, gradient and metrics.
        backend: "auto", "triton" or "torch".

    Returns:
        Loss, fp32 (fp64 if any of the per-token inputs is). d is clamped to +-20 with zero gradient outside, so that
        log-ratios of +-200 are finite; `-inf - -inf` counts as d = 0. No valid token: 0 with zero gradient. The
        gradient goes to logprobs and entropy; the other inputs are constants.
        Metrics: policy/approxkl (half of d^2), policy/clipfrac (share of tokens where the clip range cuts the gradient;
        what dual_clip cuts is not counted), val/ratio; policy/entropy and policy/kl if their inputs are given.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    options = policy_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
    normalizer = checks.normalizer(normalizer)
    if options.entropy_in_loss and entropy is None:
        raise ValueError(f"entropy is None, expected a tensor like logprobs because entropy_coef is {entropy_coef!r}")
    checks.floating("logprobs", logprobs)
    tokens.check("logprobs", logprobs, options)
    checks.no_nan("logprobs", logprobs, mask)
    if entropy is not None:
        checks.alike("entropy", entropy, "logprobs", logprobs)
        checks.no_nan("entropy", entropy, mask)
    checks.constants("ppo_loss", **tokens._asdict(), normalizer=normalizer)
    if dispatch.resolve("ppo_loss", backend, logprobs.device) == "triton":
        checks.reverse_mode("ppo_loss", logprobs=logprobs, entropy=entropy)
    run = dispatch.implementation("ppo_loss", backend, logprobs.device)
    result: Loss = run(logprobs, entropy, tokens, options, normalizer)
    return result
