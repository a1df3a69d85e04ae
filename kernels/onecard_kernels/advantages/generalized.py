"""gae: generalized advantage estimation. Results are detached."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from ..records import Advantages


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
        mask: `[B, T]`, bool or 0/1, any pattern. Masked positions are skipped without discounting, and may hold
            anything (NaN too); rewards there are ignored.
        gamma: discount, 0 to 1.
        lam: 0 (one-step errors) to 1 (returns minus values).
        last_values: `[B]`, the value after a row's last valid position, for rows that were cut off; 0 by default.
        backend: "auto", "triton" or "torch".

    Returns:
        Advantages of detached fp32 tensors `[B, T]` (fp64 if any input is), 0 at masked positions.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.reverse_mode_only("gae", rewards=rewards, values=values, last_values=last_values)
    gamma, lam = checks.python_number(gamma), checks.python_number(lam)
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
