"""PPO's losses: the policy's from log-probabilities or logits (from hidden states: `linear`), and the value's."""

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
        checks.reverse_mode_only("ppo_loss", logprobs=logprobs, entropy=entropy)
    run = dispatch.implementation("ppo_loss", backend, logprobs.device)
    result: Loss = run(logprobs, entropy, tokens, options, normalizer)
    return result


def logits_ppo_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> Loss:
    """Clipped policy loss from logits: `ppo_loss` of `selective_log_softmax`.

    logp_t = z_t[y_t] - log sum_v exp(z_t[v]),  z = logits / temperature;  entropy_t = -sum_v p_t[v] log p_t[v]

    "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347.

    Args:
        logits: `[..., V]`, any floating dtype.
        targets: `[...]`, integer ids; `targets[t]` is the token that `logits[t]` predicts. Anything (-100) where mask
            is 0.
        old_logprobs, advantages, mask: `[...]`, see `ppo_loss`.
        temperature: divides the logits.
        clip_low ... normalizer: see `ppo_loss`. The entropy has a gradient only if entropy_coef is not 0.
        backend: "auto", "triton" or "torch", of the log-probabilities.

    Returns:
        Loss, fp32 (fp64 if any floating point input is), with `ppo_loss`'s metrics, policy/entropy always among them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    options = policy_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
    checks.reverse_mode_only("logits_ppo_loss", logits=logits, **tokens._asdict(), normalizer=normalizer)
    normalizer, temperature = checks.normalizer(normalizer), checks.python_number(temperature)
    checks.integer("targets", targets)
    tokens.check("targets", targets, options)
    checks.logits(logits, targets, temperature, mask)
    run = dispatch.implementation("logits_ppo_loss", backend, logits.device)
    result: Loss = run(logits, targets, tokens, options, temperature, normalizer)
    return result


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> Loss:
    """Clipped squared error of the value function.

    v_clipped = old_v + clip(v - old_v, -clip, clip)
    loss = sum_tokens mask * weight * max((v - R)^2, (v_clipped - R)^2) / 2 / normalizer

    "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347; the clipping is that of its authors'
    implementation, see "What Matters In On-Policy Reinforcement Learning?", https://arxiv.org/abs/2006.05990.

    Args:
        values: `[...]`, `[B, T]` or packed `[tokens]`, in the unit of the rewards.
        old_values: `[...]`, those at sampling time; None only without clip.
        returns: `[...]`, what the values are fitted to.
        mask: `[...]`, bool or 0/1. Masked tokens count nowhere and have zero gradient, whatever any input holds there
            (NaN too).
        clip: above 0, how far values may move from old_values, in the same unit. None: no clipping.
        weights: `[...]`, a factor for each token's loss (not for the metric).
        normalizer: divides the sums of loss and metric, the mask's sum by default. Given the whole batch's number of
            tokens, micro-batches add up to the batch in loss, gradient and metric.
        backend: "auto", "triton" or "torch".

    Returns:
        Loss, fp32 (fp64 if any of the per-token inputs is). No valid token: 0 with zero gradient. The gradient goes to
        values; the other inputs are constants. With clip the metric val/clipfrac, the share of tokens where the
        clipped error is the larger one and cuts the gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    clip, normalizer = checks.python_number(clip), checks.normalizer(normalizer)
    if clip is not None:
        checks.positive("clip", clip)
    checks.floating("values", values)
    checks.tensor("mask", mask)
    checks.mask(mask, "values", values)
    checks.tensor("returns", returns)
    if clip is not None and old_values is None:
        raise ValueError(f"old_values is None, expected a tensor like values because clip is {clip!r}")
    optional = {"old_values": old_values, "weights": weights}
    given = {"returns": returns, **{name: value for name, value in optional.items() if value is not None}}
    for name, value in given.items():
        checks.alike(name, value, "values", values)
    for name, value in {"values": values, **given}.items():
        checks.no_nan(name, value, mask)
    checks.constants("value_loss", **given, normalizer=normalizer)
    if dispatch.resolve("value_loss", backend, values.device) == "triton":
        checks.reverse_mode_only("value_loss", values=values)
    result: Loss = dispatch.implementation("value_loss", backend, values.device)(
        values, old_values, returns, mask, clip=clip, weights=weights, normalizer=normalizer
    )
    return result
