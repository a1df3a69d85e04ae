"""PPO's policy loss straight from logits or hidden states."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from ..logprob.products import under_autocast
from ..records import Loss, divisor_of
from . import local_ops
from .options import PolicyTokens, policy_options
from .terms import metrics_of


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
    checks.reverse_mode("logits_ppo_loss", logits=logits, **tokens._asdict(), normalizer=normalizer)
    normalizer, temperature = checks.normalizer(normalizer), checks.plain(temperature)
    checks.integer("targets", targets)
    tokens.check("targets", targets, options)
    checks.logits(logits, targets, temperature, mask)
    run = dispatch.implementation("logits_ppo_loss", backend, logits.device)
    result: Loss = run(logits, targets, tokens, options, temperature, normalizer)
    return result


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
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
        weight: `[V, D]`. Autocast acts on both as in `linear_logprobs`.
        targets: `[...]`, integer ids; `targets[t]` is the token that `hidden[t]` predicts. Anything (-100) where mask
            is 0.
        old_logprobs, advantages, mask: `[...]`, see `ppo_loss`.
        bias, temperature, logit_scale, softcap, forbidden: the head, see `linear_logprobs`.
        clip_low ... normalizer: see `ppo_loss`. The entropy has a gradient only if entropy_coef is not 0; that costs
            one more GEMM in low memory, none in chunks (`logprob.plans`).
        backend: "auto", "triton" or "torch".

    Returns:
        Loss, fp32 (fp64 if any floating point input is), with `ppo_loss`'s metrics, policy/entropy always among them.
        Gradients are formed in the forward: two GEMMs with a frozen head, three with a trained one, and one for tokens
        whose advantage or weight is 0 (in chunks also for clipped ones).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    options = policy_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
    head = checks.plain_head(bias, temperature, logit_scale, softcap, forbidden)
    differentiable = {"hidden": hidden, "weight": weight, "bias": bias}
    checks.reverse_mode("linear_ppo_loss", **differentiable, **tokens._asdict(), normalizer=normalizer)
    normalizer = checks.normalizer(normalizer)
    checks.integer("targets", targets)
    tokens.check("targets", targets, options)
    checks.linear(hidden, weight, targets, head, mask)
    dispatch.resolve("linear_logprobs", backend, hidden.device)
    hidden, weight = under_autocast(hidden, weight)
    loss, sums = local_ops.sums_of(hidden, weight, targets, head, tokens, options, backend)
    divisor = divisor_of(normalizer, sums[-1].clamp(min=1.0), loss.dtype)
    return Loss(loss / divisor, metrics_of(sums / divisor, entropy=True, kl=ref_logprobs is not None))
