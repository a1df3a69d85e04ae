"""PPO's two losses on one record of experiences, and the objective that an optimizer step makes smaller."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from onecard.batches import Experience, ExperienceBatch, pack_experience, response_targets
from onecard.config import PPOConfig
from onecard.models.roles import Roles
from onecard.trainer import Objective
from onecard_kernels import Loss, linear_ppo_loss, value_loss


def policy_loss(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Loss:
    """The clipped surrogate of the policy on one record."""
    targets, head = response_targets(batch.sequences), roles.head()
    hidden = roles.hidden(batch.sequences, targets.rows)
    loss = linear_ppo_loss(
        hidden,
        head.weight,
        targets.targets,
        batch.old_logprobs,
        batch.advantages,
        torch.ones_like(targets.targets, dtype=torch.bool),
        **head.keywords(),
        temperature=config.temperature,
        clip_low=config.cliprange,
        clip_high=config.cliprange_high or config.cliprange,
        dual_clip=config.dual_clip or None,
        entropy_coef=config.entropy_coef,
        normalizer=normalizer,
    )
    return Loss(loss.loss, {**loss.metrics, "loss/policy": loss.loss.detach()})


def critic_loss(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Loss:
    """The clipped squared error of the current role's values on one record, times vf_coef."""
    targets = response_targets(batch.sequences)
    values = roles.scalars(batch.sequences, targets.rows)
    loss = value_loss(
        values,
        batch.old_values,
        batch.returns,
        torch.ones_like(targets.targets, dtype=torch.bool),
        clip=config.cliprange_value or None,
        normalizer=normalizer,
    )
    return Loss(config.vf_coef * loss.loss, {**loss.metrics, "loss/value": loss.loss.detach()})


def ppo_losses(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Iterator[Loss]:
    """Both losses, one role after the other: who takes a loss runs its backward before asking for the next."""
    yield policy_loss(roles, batch, config, normalizer)
    with roles.playing("value"):
        yield critic_loss(roles, batch, config, normalizer)


def ppo_objective(roles: Roles, config: PPOConfig) -> Objective[Experience, ExperienceBatch]:
    """What each optimizer step of PPO makes smaller, per response token."""
    return Objective(
        collate=pack_experience,
        count=lambda experiences: sum(experience.num_response_tokens for experience in experiences),
        losses=lambda batch, normalizer: ppo_losses(roles, batch, config, normalizer),
    )
