"""PPO's trained roles on one base, the loss of each, and the gradients that a backward left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onecard.config import PPOConfig
from onecard.data.batches import TokenBatch, TokenSequence, pack
from onecard.models.build import load_ppo_roles
from onecard.models.roles import Roles


def moved_roles(config: PPOConfig, by: float = 0.02) -> Roles:
    """Adapters and heads away from their start, where half of all gradients are zero."""
    roles = load_ppo_roles(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_((torch.randn(parameter.shape) * by).to(parameter))
    return roles.train()


def ppo_roles(model: Path, **settings: Any) -> Roles:
    return moved_roles(PPOConfig(model=str(model), **settings))


def some_batch(shortest: int = 12) -> TokenBatch:
    """Three sequences whose first four tokens are the prompt."""
    sequences = [tuple((31 * i + 7 * j) % 290 + 5 for i in range(shortest + j)) for j in range(3)]
    return pack([TokenSequence(each, (False,) * 4 + (True,) * (len(each) - 4)) for each in sequences])


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
