"""PPO's policy loss straight from logits or hidden states."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..logprob import linear_logprobs, selective_log_softmax
from ..records import Loss
from .policy import check_options, check_tokens, ppo_loss


def logits_ppo_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
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
    check_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator, normalizer)
    checks.integer("targets", targets)
    check_tokens("targets", targets, old_logprobs, advantages, mask, ref_logprobs, weights, kl_coef)
    policy = selective_log_softmax(
        logits,
        targets,
        temperature=temperature,
        mask=mask,
        return_entropy=True,
        entropy_requires_grad=entropy_coef != 0.0,
        backend=backend,
    )
    return ppo_loss(
        policy.logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy=policy.entropy,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        weights=weights,
        normalizer=normalizer,
        backend=_of_the_tokens(backend),
    )


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
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
    """Clipped policy loss from hidden states, without the `[tokens, V]` logits: `ppo_loss` of `linear_logprobs`.

    z = head(hidden);  logp_t = z_t[y_t] - log sum_v exp(z_t[v]);  entropy_t = -sum_v p_t[v] log p_t[v]

    "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347.

    Args:
        hidden: `[..., D]`, `[B, T, D]` or packed `[tokens, D]`.
        weight: `[V, D]`.
        targets: `[...]`, integer ids; `targets[t]` is the token that `hidden[t]` predicts. Anything (-100) where mask
            is 0.
        old_logprobs, advantages, mask: `[...]`, see `ppo_loss`.
        bias, temperature, logit_scale, softcap, forbidden: the head, see `linear_logprobs`.
        clip_low ... normalizer: see `ppo_loss`. The entropy has a gradient only if entropy_coef is not 0; that costs
            one more GEMM.
        backend: "auto", "triton" or "torch", of the log-probabilities.

    Returns:
        Loss, fp32 (fp64 if any floating point input is), with `ppo_loss`'s metrics, policy/entropy always among them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator, normalizer)
    checks.integer("targets", targets)
    check_tokens("targets", targets, old_logprobs, advantages, mask, ref_logprobs, weights, kl_coef)
    policy = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        forbidden=forbidden,
        mask=mask,
        return_entropy=True,
        entropy_requires_grad=entropy_coef != 0.0,
        backend=backend,
    )
    return ppo_loss(
        policy.logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy=policy.entropy,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        weights=weights,
        normalizer=normalizer,
        backend=_of_the_tokens(backend),
    )


def _of_the_tokens(backend: str) -> str:
    """A backend that has the log-probabilities need not have the loss, which is small beside them."""
    return "torch" if backend == "torch" else "auto"
