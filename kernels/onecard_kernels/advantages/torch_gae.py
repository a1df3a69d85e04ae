"""gae in torch: a parallel scan, without a Python loop over positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..double_backward import no_forward_ad
from ..records import Advantages, result_dtype


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, last_values: Tensor | None
) -> Advantages:
    # In eager mode, calling the operator would take as long as the scan itself.
    scan = scan_operator if torch.compiler.is_compiling() else _scan
    return Advantages(*scan(rewards, values, mask, last_values, gamma, lam))


def _scan(
    rewards: Tensor, values: Tensor, mask: Tensor, last_values: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE as a linear recurrence. A position passes C = gamma V + gamma lam A back to the valid one before it:

    A_t = r_t - V_t + C_next(t);  C_t = gamma lam r_t + (gamma - gamma lam) V_t + gamma lam C_next(t)

    Masked positions pass on what they receive, so that next(t) is t + 1 for all. Under torch.compile this is an
    operator, because a traced scan would be compiled again for every length.
    """
    length, decay = rewards.shape[1], gamma * lam
    valid = mask.bool()
    dtype = result_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    rewards, values = rewards.to(dtype), values.to(dtype)
    zero, one, step = (values.new_tensor(x) for x in (0.0, 1.0, decay))

    # Results are written into the padded tensors: at these sizes an allocation takes as long as the arithmetic.
    window = _window(length)
    passed, decays = rewards.new_empty(2, rewards.shape[0], length + window)
    torch.where(valid, torch.mul(rewards, decay).add_(values, alpha=gamma - decay), zero, out=passed[:, :length])
    torch.where(valid, step, one, out=decays[:, :length])
    passed[:, length:], decays[:, length:] = 0.0, 1.0
    if last_values is not None:
        passed[:, length] = gamma * last_values.to(dtype)
    passed = _suffix_sums(decays, passed, window)

    # Masked values may be NaN: they are replaced at the end, not multiplied by 0.
    advantages = torch.sub(rewards, values).add_(passed[:, 1:])
    returns = torch.add(advantages, values)
    return torch.where(valid, advantages, zero, out=advantages), torch.where(valid, returns, zero, out=returns)


scan_operator = torch.library.custom_op("onecard::gae_scan", _scan, mutates_args=())
no_forward_ad("gae", scan_operator)


@scan_operator.register_fake
def _(
    rewards: Tensor, values: Tensor, mask: Tensor, last_values: Tensor | None, *numbers: float
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _window(length: int) -> int:
    """A power of two from sqrt(length) to 2 sqrt(length): there are at most as many windows as positions in one."""
    return 1 << (math.isqrt(length).bit_length())


def _suffix_sums(decays: Tensor, x: Tensor, window: int) -> Tensor:
    """C_t = x_t + decays_t C_(t+1) along each row. The last window - 1 positions are padding; the result is without it.

    Doubling gives the sums over t ... t + window - 1; then each window, from the last to the first, adds the next one.
    Doubling to the end would do more work, and multiply decays until they are denormal numbers, which are slow.
    """
    spare, spare_decays = torch.empty_like(x), torch.empty_like(x)
    step, n = 1, x.shape[1]
    while step < window:
        n -= step
        torch.addcmul(x[:, :n], decays[:, :n], x[:, step : n + step], out=spare[:, :n])
        torch.mul(decays[:, :n], decays[:, step : n + step], out=spare_decays[:, :n])
        x, spare, decays, spare_decays = spare, x, spare_decays, decays
        step *= 2
    x, decays = x[:, :n], decays[:, :n]
    rest = n % window
    sizes = [rest] * (rest > 0) + [window] * (n // window)
    sums, products = x.split(sizes, 1), decays.split(sizes, 1)
    for i in range(len(sizes) - 2, -1, -1):
        sums[i].addcmul_(products[i], sums[i + 1][:, window - sizes[i] :])
    return x
