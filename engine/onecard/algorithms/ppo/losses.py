"""PPO's two losses on one record of experiences, and the objective that an optimizer step makes smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from onecard.config import PPOConfig
from onecard.data.batches import Experience, ExperienceBatch, ResponseTargets, pack_experience
from onecard.models.roles import Roles
from onecard.training.trainer import Objective
from onecard_kernels import Loss, linear_ppo_loss, value_loss

NO_CLIP = (1.0, 1e12)  # low, high; the kernels bound a ratio to e^20, so it never comes there


def policy_loss(
    roles: Roles, hidden: Tensor, targets: ResponseTargets, batch: ExperienceBatch, config: PPOConfig, normalizer: int
) -> Loss:
    """The clipped surrogate of the policy on one record; of an estimator that learns once, the free one."""
    head = roles.head()
    clip = (config.cliprange, config.cliprange_high or config.cliprange)
    low, high = NO_CLIP if config.is_single_pass else clip
    loss = linear_ppo_loss(
        hidden,
        head.weight,
        targets.targets,
        batch.old_logprobs,
        batch.advantages,
        torch.ones_like(targets.targets, dtype=torch.bool),
        **head.keywords(),
        temperature=config.temperature,
        clip_low=low,
        clip_high=high,
        dual_clip=config.dual_clip or None,
        entropy_coef=config.entropy_coef,
        normalizer=normalizer,
    )
    return Loss(loss.loss, {**loss.metrics, "loss/policy": loss.loss.detach()})


def critic_loss(values: Tensor, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Loss:
    """The clipped squared error of the critic's values on one record, times vf_coef; of a2c, the free one."""
    if batch.old_values is None:
        raise ValueError("old_values is None, expected the critic's")
    loss = value_loss(
        values,
        batch.old_values,
        batch.returns,
        torch.ones_like(values, dtype=torch.bool),
        clip=None if config.is_single_pass else config.cliprange_value or None,
        normalizer=normalizer,
    )
    return Loss(config.vf_coef * loss.loss, {**loss.metrics, "loss/value": loss.loss.detach()})


def policy_only(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Iterator[Loss]:
    """The policy's loss alone."""
    targets = batch.sequences.targets
    yield policy_loss(roles, roles.hidden(batch.sequences, targets.rows), targets, batch, config, normalizer)


def policy_then_critic(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Iterator[Loss]:
    """Both losses, one role after the other: who takes a loss runs its backward before asking for the next."""
    yield from policy_only(roles, batch, config, normalizer)
    with roles.active("value"):
        values = roles.scalars(batch.sequences, batch.sequences.targets.rows)
        yield critic_loss(values, batch, config, normalizer)


def policy_and_critic(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Iterator[Loss]:
    """The sum of both losses, from one forward of the trunk that policy and critic share."""
    targets = batch.sequences.targets
    hidden = roles.hidden(batch.sequences, targets.rows)
    policy = policy_loss(roles, hidden, targets, batch, config, normalizer)
    critic = critic_loss(roles.scalars_of(hidden, "value"), batch, config, normalizer)
    yield Loss(policy.loss + critic.loss, {**policy.metrics, **critic.metrics})


Losses = Callable[[Roles, ExperienceBatch, PPOConfig, int], Iterator[Loss]]
LOSSES: dict[str, Losses] = {"none": policy_only, "adapter": policy_then_critic, "shared": policy_and_critic}


def critic_kind(roles: Roles) -> str:
    """What the critic is among these roles: none, an adapter of its own, or a head on the policy's trunk."""
    if "value" not in roles.adapters:
        return "none"
    return "adapter" if roles.has_own_weights("value") else "shared"


def ppo_objective(roles: Roles, config: PPOConfig) -> Objective[Experience, ExperienceBatch]:
    """What each optimizer step of PPO makes smaller, per response token."""
    losses = LOSSES[critic_kind(roles)]
    return Objective(
        collate=pack_experience,
        count=lambda experiences: sum(experience.num_response_tokens for experience in experiences),
        losses=lambda batch, normalizer: losses(roles, batch, config, normalizer),
    )
