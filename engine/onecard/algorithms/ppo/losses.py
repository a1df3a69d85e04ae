"""PPO's losses on a batch of experiences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from onecard.config import PPOConfig
from onecard.data.batches import Experience, ExperienceBatch, pack_experience
from onecard.models.roles import Roles
from onecard.training.trainer import Objective
from onecard_kernels import Loss, linear_ppo_loss, value_loss

NO_CLIP = (1.0, 1e12)  # low, high; the kernels bound a ratio to e^20, so it never comes there


def ppo_losses(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Iterator[Loss]:
    """The policy's clipped surrogate, and vf_coef times the critic's clipped squared error where there is a critic.

    An estimator that passes over the responses once does not clip. A critic with an adapter of its own is a second
    loss: the trainer runs the policy's backward first, so only one role's activations are held. A critic on the
    policy's trunk is added to the policy's loss: both have one forward pass.
    """
    targets = batch.sequences.targets
    hidden, head = roles.hidden(batch.sequences, targets.rows), roles.head()
    clip = (config.cliprange, config.cliprange_high or config.cliprange)
    low, high = NO_CLIP if config.is_single_pass else clip
    policy = linear_ppo_loss(
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
    policy = Loss(policy.loss, {**policy.metrics, "loss/policy": policy.loss.detach()})
    if "value" in roles.adapters and not roles.has_own_weights("value"):
        critic = critic_loss(roles.scalars_of(hidden, "value"), batch, config, normalizer)
        yield Loss(policy.loss + critic.loss, {**policy.metrics, **critic.metrics})
        return
    yield policy
    del policy, hidden  # the critic's pass starts without the policy's tensors
    if "value" in roles.adapters:
        with roles.active("value"):
            yield critic_loss(roles.scalars(batch.sequences, targets.rows), batch, config, normalizer)


def critic_loss(values: Tensor, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Loss:
    """The clipped squared error of the critic's values, times vf_coef."""
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


def ppo_objective(roles: Roles, config: PPOConfig) -> Objective[Experience, ExperienceBatch]:
    """What each optimizer step of PPO minimises, per response token."""
    return Objective(
        collate=pack_experience,
        count=lambda experiences: sum(experience.num_response_tokens for experience in experiences),
        losses=lambda batch, normalizer: ppo_losses(roles, batch, config, normalizer),
    )
