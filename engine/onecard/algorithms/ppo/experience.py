"""From sampled answers to what PPO learns from: passes over the tokens, rewards per token, advantages.

    episodes -> old and reference log-probs, values -> -kl_coef * KL per token, the score on the last token
    -> (whitened rewards) -> GAE -> whitened advantages -> Experience

Everything here is computed once for an iteration's episodes, without gradients, and belongs to them as they are: no
later stage changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from onecard.batches import (
    Episode,
    Experience,
    ResponseTargets,
    TokenBatch,
    like_lengths,
    pack,
    response_targets,
    to_device,
)
from onecard.config import PPOConfig
from onecard.errors import OnecardError
from onecard.models.roles import Roles
from onecard_kernels import gae, masked_whiten, token_kl


@dataclass(frozen=True)
class Passes:
    """What the roles say about each episode: fp32 [k], one entry per response token, on the CPU."""

    logprobs: list[Tensor]
    ref_logprobs: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True)
class Shaped:
    """The same as padded tensors [B, T], with the rewards and what follows from them. `mask` bool marks real tokens."""

    mask: Tensor
    kl: Tensor
    rewards: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def per_token(
    roles: Roles,
    role: str,
    episodes: Sequence[Episode],
    read: Callable[[TokenBatch, ResponseTargets], Tensor],
    batch_size: int,
) -> list[Tensor]:
    """`read` of each episode's response tokens under a role, in batches of like lengths, in the episodes' order."""
    found: list[Tensor] = [torch.empty(0)] * len(episodes)
    with roles.playing(role):
        for chosen in like_lengths([len(episode) for episode in episodes], batch_size):
            batch = to_device(pack([episodes[index].sequence for index in chosen]), roles.device)
            lengths = [len(episodes[index].sampling_logprobs) for index in chosen]
            pieces = read(batch, response_targets(batch)).cpu().split(lengths)
            for index, piece in zip(chosen, pieces, strict=True):
                found[index] = piece.clone()  # a view would keep its whole batch alive
    return found


def logprobs_of(roles: Roles, role: str, episodes: Sequence[Episode], config: PPOConfig) -> list[Tensor]:
    """Log-probs of the sampled tokens under a role, at the temperature they were sampled with."""

    def read(batch: TokenBatch, targets: ResponseTargets) -> Tensor:
        return roles.logprobs(batch, targets, config.temperature)

    return per_token(roles, role, episodes, read, config.per_device_eval_batch_size)


def values_of(roles: Roles, episodes: Sequence[Episode], config: PPOConfig) -> list[Tensor]:
    """The critic's value of the state in which each token is chosen: at the row that predicts it."""

    def read(batch: TokenBatch, targets: ResponseTargets) -> Tensor:
        return roles.scalars(batch, targets.rows)

    return per_token(roles, "value", episodes, read, config.per_device_eval_batch_size)


def make_passes(roles: Roles, episodes: Sequence[Episode], config: PPOConfig) -> Passes:
    """Three passes without gradients. A role whose numbers are none any more is named."""
    passes = {
        "policy's log-probs": logprobs_of(roles, "policy", episodes, config),
        "reference's log-probs": logprobs_of(roles, "reference", episodes, config),
        "critic's values": values_of(roles, episodes, config),
    }
    for what, pieces in passes.items():
        if not all(bool(piece.isfinite().all()) for piece in pieces):
            raise OnecardError(
                f"ppo: the {what} of sampled answers are not finite: it has diverged, or its dtype overflows; a lower "
                "learning_rate or another dtype usually helps. The last checkpoint is from before that."
            )
    return Passes(*passes.values())


def pad(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors [k] of different lengths as one [B, T], zeros after each end."""
    return pad_sequence(list(pieces), batch_first=True)


def shape_rewards(passes: Passes, scores: Tensor, kl_coef: float, config: PPOConfig) -> Shaped:
    """Rewards, advantages and returns of an iteration.

        reward_t = -kl_coef * KL_t + [t is the last response token] * score
        A_t = sum_l (gamma lam)^l (reward_{t+l} + gamma V_{t+l+1} - V_{t+l}),  return_t = A_t + V_t

    `scores` fp32 [B]. The last response token is the one that ended the answer, where one did. Rewards are whitened
    before GAE and keep their mean, advantages after it and lose theirs; both over the response tokens of all episodes.
    """
    lengths = torch.tensor([len(piece) for piece in passes.logprobs])
    logprobs, values = pad(passes.logprobs), pad(passes.values)
    mask = torch.arange(logprobs.shape[1]) < lengths.unsqueeze(1)
    kl = token_kl(logprobs, pad(passes.ref_logprobs), estimator=config.kl_estimator)
    rewards = -kl_coef * kl
    rewards[torch.arange(len(lengths)), lengths - 1] += scores
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    return Shaped(mask, kl, rewards, values, masked_whiten(advantages, mask), returns)


def make_experiences(episodes: Sequence[Episode], passes: Passes, shaped: Shaped) -> list[Experience]:
    """One record for each episode."""
    return [
        Experience(
            episode=episode,
            old_logprobs=passes.logprobs[row],
            old_values=passes.values[row],
            advantages=shaped.advantages[row, : len(passes.logprobs[row])].clone(),
            returns=shaped.returns[row, : len(passes.logprobs[row])].clone(),
        )
        for row, episode in enumerate(episodes)
    ]


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that knows no more than the mean."""
    variance = float(returns.var(unbiased=False))
    return 1.0 - float((returns - values).var(unbiased=False)) / variance if variance > 0 else 0.0


def answer_metrics(
    episodes: Sequence[Episode], logprobs: Sequence[Tensor], ref_logprobs: Sequence[Tensor], scores: Tensor
) -> dict[str, float]:
    """What answers came to, in training and in evaluation."""
    kl = pad(logprobs) - pad(ref_logprobs)
    finished = sum(episode.finished for episode in episodes)
    return {
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std(unbiased=False)),
        "objective/kl": float(kl.sum(1).mean()),
        "completions/mean_length": sum(map(len, logprobs)) / len(episodes),
        "completions/clipped_ratio": 1.0 - finished / len(episodes),
    }


def objective_metrics(
    episodes: Sequence[Episode], passes: Passes, shaped: Shaped, scores: Tensor, kl_coef: float
) -> dict[str, float]:
    """What an iteration's answers came to, by TRL's names."""
    penalty = -kl_coef * shaped.kl.sum(1).mean()
    return {
        **answer_metrics(episodes, passes.logprobs, passes.ref_logprobs, scores),
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": float(penalty),
        "objective/rlhf_reward": float(scores.mean() + penalty),
        "objective/entropy": float(-pad(passes.logprobs).sum(1).mean()),
        "val/explained_variance": explained_variance(shaped.values[shaped.mask], shaped.returns[shaped.mask]),
        "val/num_eos_tokens": float(sum(episode.finished for episode in episodes)),
    }


def next_kl_coef(kl_coef: float, kl: float, episodes: int, config: PPOConfig) -> float:
    """The coefficient for the next iteration: the same, or one that leads the KL to its target.

        e = clip(kl / target - 1, -0.2, 0.2);  kl_coef *= 1 + e * episodes / horizon

    "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593, section 2.2.
    """
    if not config.adap_kl_ctrl:
        return kl_coef
    error = min(max(kl / config.adap_kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / config.adap_kl_horizon)
