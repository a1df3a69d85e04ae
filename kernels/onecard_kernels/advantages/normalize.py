"""group_advantages and masked_whiten: normalized scores and advantages. Results are detached."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..records import result_dtype


def _grpo(r: Tensor, eps: float) -> Tensor:
    centred = _grpo_no_std(r, eps)
    variance = centred.square().sum(1, keepdim=True) / (r.shape[1] - 1)
    return centred / (variance.sqrt() + eps)


def _grpo_no_std(r: Tensor, eps: float) -> Tensor:
    return r - r.mean(1, keepdim=True)


def _rloo(r: Tensor, eps: float) -> Tensor:
    # r - mean of the others, as a multiple of r - mean of all: a common offset of the scores loses no precision.
    return _grpo_no_std(r, eps) * (r.shape[1] / (r.shape[1] - 1))


GROUP_KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "grpo": _grpo,
    "grpo_no_std": _grpo_no_std,
    "rloo": _rloo,
}
COMPARES_WITH_OTHERS = ("grpo", "rloo")  # undefined in a group of one


def group_advantages(scores: Tensor, *, group_size: int, kind: str = "grpo", eps: float = 1e-4) -> Tensor:
    """Advantages of responses over the other responses to the same prompt.

    grpo         (r - mean) / (std + eps), std unbiased (GRPO, https://arxiv.org/abs/2402.03300)
    grpo_no_std  r - mean (Dr. GRPO, https://arxiv.org/abs/2503.20783)
    rloo         r - mean of the other responses' scores (RLOO, https://arxiv.org/abs/2402.14740)

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
    group_size, eps = checks.python_number(group_size), checks.python_number(eps)
    checks.one_of("kind", kind, GROUP_KINDS)
    checks.positive("eps", eps)
    checks.floating("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected [B], one value per response")
    least = 2 if kind in COMPARES_WITH_OTHERS else 1
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < least:
        raise ValueError(f"group_size is {group_size!r}, expected an integer of {least} or more for kind {kind!r}")
    if scores.shape[0] % group_size:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected [B] with B a multiple of {group_size}")
    checks.no_nan("scores", scores)
    groups = scores.detach().to(result_dtype(scores.dtype)).reshape(-1, group_size)
    return GROUP_KINDS[kind](groups, eps).reshape(-1)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """Shift the valid entries to mean 0, and scale them to variance 1.

    (x - mean) / sqrt(var + eps), plus mean if shift_mean is False; mean and var are those of the valid entries

    "High-Dimensional Continuous Control Using Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438, for
    the advantages; "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593, for rewards
    (shift_mean=False).

    Args:
        x: `[...]`, floating.
        mask: `[...]`, bool or 0/1. Masked entries may hold anything (NaN too).
        shift_mean: False keeps the mean.
        unbiased: divide the sum of squares by the number of entries minus one.
        eps: above 0, in the unit of x squared.

    Returns:
        Detached fp32 `[...]` (fp64 in, fp64 out), 0 at masked entries. With one valid entry the variance is 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.constants("masked_whiten", x=x)
    eps = checks.python_number(eps)
    checks.positive("eps", eps)
    checks.floating("x", x)
    checks.tensor("mask", mask)
    checks.mask(mask, "x", x)
    checks.no_nan("x", x, mask)
    valid = mask.bool()
    x = torch.where(valid, x.detach().to(result_dtype(x.dtype)), 0.0)
    count = valid.sum()
    mean = x.sum() / count.clamp(min=1)
    centred = torch.where(valid, x - mean, 0.0)
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else torch.where(valid, whitened + mean, 0.0)
