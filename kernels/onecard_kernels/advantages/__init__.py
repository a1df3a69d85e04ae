"""Rewards to advantages. All results are detached: they are constants of the policy gradient."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from ..records import Advantages
from . import reference


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
    backend: str = "auto",
) -> Advantages:
    """Generalized advantage estimates of each row.

    delta_t = r_t + gamma V_next(t) - V_t;  A_t = delta_t + gamma lam A_next(t);  return_t = A_t + V_t
    next(t) is the row's next valid position; after the last one V_next is last_values and A_next is 0.

    "High-Dimensional Continuous Control Using Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438.

    Args:
        rewards: `[B, T]`.
        values: `[B, T]`, in the unit of the rewards.
        mask: `[B, T]`, bool or 0/1, any pattern. Masked positions are stepped over, not decayed through, and may hold
            anything (NaN too); a reward there is lost.
        gamma: discount, 0 to 1.
        lam: 0 (one-step errors) to 1 (returns minus values).
        last_values: `[B]`, the value after a row's last valid position, for rows that were cut off; 0 by default.
        backend: "auto", "triton" or "torch".

    Returns:
        Advantages of detached fp32 tensors `[B, T]` (fp64 if any input is), 0 at masked positions.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.reverse_mode("gae", rewards=rewards, values=values, last_values=last_values)
    gamma, lam = checks.plain(gamma), checks.plain(lam)
    checks.within("gamma", gamma, 0.0, 1.0)
    checks.within("lam", lam, 0.0, 1.0)
    checks.floating("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected [B, T]")
    checks.alike("values", values, "rewards", rewards)
    checks.tensor("mask", mask)
    checks.mask(mask, "rewards", rewards)
    checks.no_nan("rewards", rewards, mask)
    checks.no_nan("values", values, mask)
    if last_values is not None:
        checks.floating("last_values", last_values)
        checks.shape("last_values", last_values, rewards.shape[:1], "one per row of rewards")
        checks.device("last_values", last_values, "rewards", rewards)
        if checks.values_are_checked(mask.device):
            checks.no_nan("last_values", last_values, mask.bool().any(1))
    result: Advantages = dispatch.implementation("gae", backend, rewards.device)(
        rewards, values, mask, gamma=gamma, lam=lam, last_values=last_values
    )
    return result


def group_advantages(scores: Tensor, *, group_size: int, kind: str = "grpo", eps: float = 1e-4) -> Tensor:
    """Advantages of responses over the others to the same prompt.

    grpo         (r - mean) / (std + eps), std unbiased (GRPO, https://arxiv.org/abs/2402.03300)
    grpo_no_std  r - mean (Dr. GRPO, https://arxiv.org/abs/2503.20783)
    rloo         r - mean of the others' (RLOO, https://arxiv.org/abs/2402.14740)

    Args:
        scores: `[B]`, one per response; each group_size consecutive ones answer the same prompt.
        group_size: responses per prompt; a divisor of B, at least 2 (grpo_no_std: 1).
        kind: "grpo", "grpo_no_std" or "rloo".
        eps: above 0, in the unit of the scores; used by grpo.

    Returns:
        Detached fp32 `[B]` (fp64 in, fp64 out).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.constants("group_advantages", scores=scores)
    group_size, eps = checks.plain(group_size), checks.plain(eps)
    checks.one_of("kind", kind, reference.GROUP_KINDS)
    checks.positive("eps", eps)
    checks.floating("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected [B], one value per response")
    least = 2 if kind in reference.COMPARES_WITH_OTHERS else 1
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < least:
        raise ValueError(f"group_size is {group_size!r}, expected an integer of {least} or more for kind {kind!r}")
    if scores.shape[0] % group_size:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected [B] with B a multiple of {group_size}")
    checks.no_nan("scores", scores)
    return reference.group_advantages(scores, group_size=group_size, kind=kind, eps=eps)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """Scale the valid entries to variance 1, and shift them to mean 0.

    (x - mean) / sqrt(var + eps), mean and var over the valid entries; + mean if shift_mean is False

    "High-Dimensional Continuous Control Using Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438, for
    the advantages; "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593, for rewards
    (shift_mean=False).

    Args:
        x: `[...]`.
        mask: `[...]`, bool or 0/1. Masked entries may hold anything (NaN too).
        shift_mean: False keeps the mean.
        unbiased: divide the sum of squares by the number of entries minus one.
        eps: above 0, in the unit of x squared.

    Returns:
        Detached fp32 `[...]` (fp64 in, fp64 out), 0 at masked entries. One valid entry counts as variance 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.constants("masked_whiten", x=x)
    eps = checks.plain(eps)
    checks.positive("eps", eps)
    checks.floating("x", x)
    checks.tensor("mask", mask)
    checks.mask(mask, "x", x)
    checks.no_nan("x", x, mask)
    return reference.masked_whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps)


__all__ = ["gae", "group_advantages", "masked_whiten"]
