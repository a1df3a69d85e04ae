"""PPO's trained roles on one base, the loss of each, and the gradients that a backward left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onecard.config import PPOConfig
from onecard.data.batches import TokenBatch
from onecard.models.build import load_ppo_roles
from onecard.models.roles import Roles


def ppo_roles(model: Path, **settings: Any) -> Roles:
    """Both adapters and the value head away from their start, where half of all gradients are zero."""
    roles = load_ppo_roles(PPOConfig(model=str(model), **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return roles.train()


def policy_part(roles: Roles, batch: TokenBatch) -> torch.Tensor:
    return roles.logprobs(batch, batch.targets).sum()


def value_part(roles: Roles, batch: TokenBatch) -> torch.Tensor:
    with roles.active("value"):
        return roles.scalars(batch, batch.targets.rows).square().sum()


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    """Of the parameters that have one, which then have none."""
    trained = roles.trained_parameters()
    found = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    roles.zero_grad()
    return found
