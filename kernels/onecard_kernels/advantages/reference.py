"""The plain formulas of advantages, in fp32 or fp64. Arguments are checked by the callers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..logprob.passes import result_dtype
from ..records import Advantages


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


def _grpo(r: Tensor, eps: float) -> Tensor:
    centred = _grpo_no_std(r, eps)
    variance = centred.square().sum(1, keepdim=True) / (r.shape[1] - 1)
    return centred / (variance.sqrt() + eps)


def _grpo_no_std(r: Tensor, eps: float) -> Tensor:
    return r - r.mean(1, keepdim=True)


def _rloo(r: Tensor, eps: float) -> Tensor:
    # r - mean of the others, without the others' sum: a common offset of the scores costs no digits.
    return _grpo_no_std(r, eps) * (r.shape[1] / (r.shape[1] - 1))


GROUP_KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "grpo": _grpo,
    "grpo_no_std": _grpo_no_std,
    "rloo": _rloo,
}
COMPARES_WITH_OTHERS = ("grpo", "rloo")  # undefined in a group of one


@torch.no_grad()
def group_advantages(scores: Tensor, *, group_size: int, kind: str, eps: float) -> Tensor:
    groups = scores.to(result_dtype(scores.dtype)).reshape(-1, group_size)
    return GROUP_KINDS[kind](groups, eps).reshape(-1)


@torch.no_grad()
def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
    valid = mask.bool()
    x = torch.where(valid, x.to(result_dtype(x.dtype)), 0.0)
    count = valid.sum()
    mean = x.sum() / count.clamp(min=1)
    centred = torch.where(valid, x - mean, 0.0)
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else torch.where(valid, whitened + mean, 0.0)
