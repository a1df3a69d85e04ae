"""Constrained PPO: each response has a cost, which should stay below a threshold.

skip         a response above the threshold gives no gradient, and is in no mean or baseline of the others
lagrangian   max over the policy, min over lambda >= 0:  E[score] - lambda (E[cost] - threshold)

In lagrangian the terminal score becomes score - lambda * cost, and after each iteration
lambda = max(0, lambda + lr * (mean cost - threshold)): PPO-Lagrangian of "Benchmarking Safe Exploration in Deep
Reinforcement Learning" (Ray et al., 2019, https://cdn.openai.com/safexp-short.pdf), as "Safe RLHF" has it for
language models (https://arxiv.org/abs/2310.12773), which learns log lambda instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.config import PPOConfig


@dataclass(frozen=True)
class ConstrainedScores:
    """Terminal `scores` fp32 [B] after the costs, and `kept` bool [B]: which responses are learned from."""

    scores: Tensor
    kept: Tensor


def skip(scores: Tensor, costs: Tensor, multiplier: float, threshold: float) -> ConstrainedScores:
    """Leave out responses above the threshold."""
    return ConstrainedScores(scores, costs <= threshold)


def lagrangian(scores: Tensor, costs: Tensor, multiplier: float, threshold: float) -> ConstrainedScores:
    """Keep all responses, and subtract lambda times the cost from the score."""
    return ConstrainedScores(scores - multiplier * costs, torch.ones_like(costs, dtype=torch.bool))


MODES: dict[str, Callable[[Tensor, Tensor, float, float], ConstrainedScores]] = {"skip": skip, "lagrangian": lagrangian}


def apply_constraint(scores: Tensor, costs: Tensor | None, multiplier: float, config: PPOConfig) -> ConstrainedScores:
    """Apply `constraint_mode` to terminal scores and costs; without costs the scores stay."""
    if costs is None:
        return ConstrainedScores(scores, torch.ones_like(scores, dtype=torch.bool))
    return MODES[config.constraint_mode](scores, costs, multiplier, config.constraint_threshold)


def cost_metrics(costs: Tensor, config: PPOConfig) -> dict[str, float]:
    """Metrics of the costs, in training and in evaluation."""
    return {
        "constraint/cost": float(costs.mean()),
        "constraint/violation_rate": float((costs > config.constraint_threshold).float().mean()),
    }


def next_multiplier(multiplier: float, cost: float, config: PPOConfig) -> float:
    """Lambda for the next iteration: one step of gradient ascent."""
    return max(0.0, multiplier + config.constraint_lambda_lr * (cost - config.constraint_threshold))
