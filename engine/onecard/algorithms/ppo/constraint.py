"""Constrained PPO: each response has a cost, which should stay below a threshold.

skip         a response above the threshold is not in the loss, nor in the means and baselines of the others
lagrangian   max over the policy, min over lambda >= 0:  E[score] - lambda (E[cost] - threshold)

In lagrangian the terminal score becomes score - lambda * cost, and after each iteration
lambda = max(0, lambda + lr * (mean cost - threshold)): PPO-Lagrangian of "Benchmarking Safe Exploration in Deep
Reinforcement Learning" (Ray et al., 2019, https://cdn.openai.com/safexp-short.pdf), applied to
language models by "Safe RLHF" (https://arxiv.org/abs/2310.12773), which updates log lambda instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.config import PPOConfig


@dataclass(frozen=True)
class ConstrainedScores:
    """Terminal `scores` fp32 [B] with the costs subtracted (lagrangian), and `in_loss` bool [B]: not skipped."""

    scores: Tensor
    in_loss: Tensor


def apply_constraint(scores: Tensor, costs: Tensor | None, multiplier: float, config: PPOConfig) -> ConstrainedScores:
    """Apply `constraint_mode` to terminal scores and costs fp32 [B]; without costs the scores are unchanged."""
    if costs is None:
        return ConstrainedScores(scores, torch.ones_like(scores, dtype=torch.bool))
    if config.constraint_mode == "skip":
        return ConstrainedScores(scores, costs <= config.constraint_threshold)
    return ConstrainedScores(scores - multiplier * costs, torch.ones_like(costs, dtype=torch.bool))


def cost_metrics(costs: Tensor, config: PPOConfig) -> dict[str, float]:
    """Metrics of the costs, in training and in evaluation."""
    return {
        "constraint/cost": float(costs.mean()),
        "constraint/violation_rate": float((costs > config.constraint_threshold).float().mean()),
    }


def next_multiplier(multiplier: float, cost: float, config: PPOConfig) -> float:
    """Lambda for the next iteration: one step of gradient ascent."""
    return max(0.0, multiplier + config.constraint_lambda_lr * (cost - config.constraint_threshold))
