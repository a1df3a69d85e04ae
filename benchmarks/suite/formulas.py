"""PPO's losses in plain PyTorch (as in the `PPOTrainer` that TRL has removed), and their fp64 oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.oracle import Inputs

CLIP = 0.2
CLIPPED_SHARE = 0.15
NEAR, FAR = 0.1, 0.4  # |log-ratio| of free and of clipped tokens; the clip edges are at -0.22 and 0.18


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The loss, then the metrics a trainer logs."""
    difference = new - old
    ratio = torch.exp(difference)
    losses = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - CLIP, 1.0 + CLIP)
    loss = masked_mean(torch.max(losses, clipped), mask)
    with torch.no_grad():
        clip_share = masked_mean((clipped > losses).float(), mask)
        approximate_kl = 0.5 * masked_mean(difference**2, mask)
        mean_ratio = masked_mean(ratio, mask)
    return loss, clip_share, approximate_kl, mean_ratio


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    clipped = torch.clamp(values, old - CLIP, old + CLIP)
    losses, losses_clipped = torch.square(values - returns), torch.square(clipped - returns)
    loss = 0.5 * masked_mean(torch.max(losses, losses_clipped), mask)
    with torch.no_grad():
        clip_share = masked_mean((losses_clipped > losses).float(), mask)
    return loss, clip_share


def clip_share_inputs(exact: Tensor, seed: int) -> Inputs:
    """Old log-probabilities (fp32) that clip 15 % of the tokens whose true ones are `exact`, advantages, and a mask."""
    generator = torch.Generator(exact.device).manual_seed(seed + 1000)

    def uniform() -> Tensor:
        return torch.rand(exact.shape, generator=generator, device=exact.device)

    advantages = torch.randn(exact.shape, generator=generator, device=exact.device)
    # Above the range with a positive advantage, or below it with a negative one: there the clip stops the gradient.
    far = FAR * advantages.sign()
    difference = torch.where(uniform() < CLIPPED_SHARE, far, NEAR * (2 * uniform() - 1))
    mask = torch.ones(exact.shape, dtype=torch.bool, device=exact.device)
    return {"old_logprobs": (exact - difference.double()).float(), "advantages": advantages, "mask": mask}


def policy_oracle(exact: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(loss, dloss/dlogp) in fp64."""
    old, a = inputs["old_logprobs"].double(), inputs["advantages"].double()
    ratio, count = (exact - old).exp(), inputs["mask"].sum()
    stopped = ((a > 0) & (ratio > 1 + CLIP)) | ((a < 0) & (ratio < 1 - CLIP))
    losses = torch.where(stopped, -a * ratio.clamp(1 - CLIP, 1 + CLIP), -a * ratio)
    coefficients = torch.where(stopped | ~inputs["mask"], 0.0, -a * ratio) / count
    return torch.where(inputs["mask"], losses, 0.0).sum() / count, coefficients


def value_oracle(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(loss, dloss/dvalues) in fp64."""
    values, old, returns = (inputs[name].double() for name in ("values", "old_values", "returns"))
    count, moved = inputs["mask"].sum(), values - old
    clipped = old + moved.clamp(-CLIP, CLIP)
    stopped = (moved.abs() > CLIP) & ((clipped - returns).abs() > (values - returns).abs())
    losses = torch.where(stopped, (clipped - returns).square(), (values - returns).square()) / 2
    slopes = torch.where(stopped | ~inputs["mask"], 0.0, values - returns) / count
    return torch.where(inputs["mask"], losses, 0.0).sum() / count, slopes
