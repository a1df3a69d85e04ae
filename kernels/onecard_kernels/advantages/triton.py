"""gae in Triton, one launch: a program scans a row from its end, a block of positions at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..double_backward import no_forward_ad
from ..records import Advantages, result_dtype

# Positions that a program scans at a time; a longer row takes several iterations
LARGEST_BLOCK = 2048
PER_THREAD = 4  # positions per thread; with eight, the scan's values and masks do not fit into registers


@triton.jit
def _combine(later_decay, later_sum, decay, sum_):
    return later_decay * decay, sum_ + decay * later_sum


# Scalars are annotated fp64: as Python floats they would be passed as fp32, too coarse for fp64 tensors.
@triton.jit
def _gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    last_ptr,
    advantages_ptr,
    returns_ptr,
    length,
    rewards_row,
    rewards_step,
    values_row,
    values_step,
    mask_row,
    mask_step,
    last_row,
    gamma: tl.float64,
    decay: tl.float64,
    rest: tl.float64,
    HAS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Position t passes C_t = gamma V_t + decay A_t back, with decay = gamma lam and rest = gamma - decay:

    A_t = r_t - V_t + C_next(t);  C_t = decay r_t + rest V_t + decay C_next(t)

    C_next(t) is the scan at t + 1, where masked positions pass on what they receive. So rewards, values and mask are
    read at t + 1 for the scan and at t for A_t; the second time comes from the cache.
    """
    compute = advantages_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    rewards_ptr += row * rewards_row
    values_ptr += row * values_row
    mask_ptr += row * mask_row
    decay_ = tl.full((), decay, compute)
    rest_ = tl.full((), rest, compute)
    carry = tl.full((), 0.0, compute)
    if HAS_LAST:
        carry += tl.full((), gamma, compute) * tl.load(last_ptr + row * last_row).to(compute)

    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i).to(tl.int64) * BLOCK + lane
        following = t + 1
        inside = following < length
        valid = tl.load(mask_ptr + following * mask_step, mask=inside, other=0).to(tl.float32) != 0
        reward = tl.load(rewards_ptr + following * rewards_step, mask=inside, other=0.0).to(compute)
        value = tl.load(values_ptr + following * values_step, mask=inside, other=0.0).to(compute)
        sums = tl.where(valid, decay_ * reward + rest_ * value, 0.0)
        decays = tl.where(valid, decay_, 1.0)
        decays, sums = tl.associative_scan((decays, sums), 0, _combine, reverse=True)
        passed = sums + decays * carry
        carry = tl.sum(tl.where(lane == 0, passed, 0.0), 0)

        inside = t < length
        valid = tl.load(mask_ptr + t * mask_step, mask=inside, other=0).to(tl.float32) != 0
        reward = tl.load(rewards_ptr + t * rewards_step, mask=inside, other=0.0).to(compute)
        value = tl.where(valid, tl.load(values_ptr + t * values_step, mask=inside, other=0.0).to(compute), 0.0)
        advantage = tl.where(valid, reward - value + passed, 0.0)
        tl.store(advantages_ptr + row * length + t, advantage, mask=inside)
        tl.store(returns_ptr + row * length + t, advantage + value, mask=inside)


def launch_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, of tensors with any strides."""
    dtype = result_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    rows, length = rewards.shape
    advantages, returns = (torch.empty((rows, length), dtype=dtype, device=rewards.device) for _ in range(2))
    if advantages.numel() == 0:
        return advantages, returns
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    last = rewards if last_values is None else last_values
    block = min(LARGEST_BLOCK, triton.next_power_of_2(length))
    with torch.cuda.device_of(rewards):
        _gae_kernel[(rows,)](
            rewards,
            values,
            mask,
            last,
            advantages,
            returns,
            length,
            *rewards.stride(),
            *values.stride(),
            *mask.stride(),
            last.stride(0),
            gamma,
            gamma * lam,
            gamma - gamma * lam,
            num_warps=min(16, max(1, block * dtype.itemsize // (32 * 4 * PER_THREAD))),
            num_stages=2,
            HAS_LAST=last_values is not None,
            BLOCK=block,
        )
    return advantages, returns


_gae = torch.library.custom_op(
    "onecard::gae",
    mutates_args=(),
    schema="(Tensor rewards, Tensor values, Tensor mask, Tensor? last_values, float gamma, float lam)"
    " -> (Tensor advantages, Tensor returns)",
)(launch_gae)


@_gae.register_fake
def _(rewards, values, mask, last_values, gamma, lam):
    dtype = result_dtype(*(x.dtype for x in (rewards, values, last_values) if x is not None))
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


no_forward_ad("gae", _gae)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, last_values: Tensor | None
) -> Advantages:
    return Advantages(*_gae(rewards, values, mask, last_values, gamma, lam))
