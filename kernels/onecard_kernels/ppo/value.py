"""PPO's clipped value loss."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from ..records import Loss


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
    clip, normalizer = checks.plain(clip), checks.normalizer(normalizer)
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
        checks.reverse_mode("value_loss", values=values)
    result: Loss = dispatch.implementation("value_loss", backend, values.device)(
        values, old_values, returns, mask, clip=clip, weights=weights, normalizer=normalizer
    )
    return result
