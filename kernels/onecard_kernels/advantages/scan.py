"""GAE on tensors, without a step of Python for each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..logprob.passes import result_dtype
from ..records import Advantages


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, last_values: Tensor | None
) -> Advantages:
    return Advantages(*torch.ops.onecard.gae_scan(rewards, values, mask, last_values, gamma, lam))


@torch.library.custom_op("onecard::gae_scan", mutates_args=())
def _scan(
    rewards: Tensor, values: Tensor, mask: Tensor, last_values: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """What a position hands back to the valid one before it is C = gamma V + gamma lam A, all in one number:

    A_t = r_t - V_t + C_next(t);  C_t = gamma lam r_t + (gamma - gamma lam) V_t + gamma lam C_next(t)

    Masked positions hand on what they are handed, so that next(t) is t + 1 for all. An operator, for a compiler would
    make a program of its own for every length.
    """
    length, decay = rewards.shape[1], gamma * lam
    valid = mask.bool()
    dtype = result_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    rewards, values = (torch.where(valid, x.to(dtype), 0.0) for x in (rewards, values))

    window = _window(length)
    handed = functional.pad(torch.add(rewards * decay, values, alpha=gamma - decay), (0, window))
    decays = functional.pad(torch.where(valid, decay, torch.ones_like(values)), (0, window), value=1.0)
    if last_values is not None:
        handed[:, length] = gamma * last_values.to(dtype)
    handed = _suffix_sums(decays, handed, window)

    advantages = torch.where(valid, rewards.sub_(values).add_(handed[:, 1:]), 0.0)
    return advantages, values.add_(advantages)


@_scan.register_fake
def _(
    rewards: Tensor, values: Tensor, mask: Tensor, last_values: Tensor | None, *numbers: float
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _window(length: int) -> int:
    """A power of two between the root of the length and twice that: as many windows as one has positions, or fewer."""
    return 1 << (math.isqrt(length).bit_length())


def _suffix_sums(decays: Tensor, x: Tensor, window: int) -> Tensor:
    """C_t = x_t + decays_t C_(t+1) along rows whose last window - 1 positions are padding, which the result lacks.

    First by doubling, up to the sum over t ... t + window - 1, then backwards a window at a time. Doubling all the way
    does more work, and multiplies decays until they are denormal numbers, which are slow; products of one window are
    as far as it goes here.
    """
    step = 1
    while step < window:
        x = torch.addcmul(x[:, :-step], decays[:, :-step], x[:, step:])
        decays = decays[:, :-step] * decays[:, step:]
        step *= 2
    for stop in range(x.shape[1] - window, 0, -window):
        start = max(0, stop - window)
        x[:, start:stop].addcmul_(decays[:, start:stop], x[:, start + window : stop + window])
    return x
