"""Experience from sampled responses: log-probs and values, per-token rewards, advantages.

    episodes -> old and reference log-probs, values -> -kl_coef * KL and dense reward per token, score on the last one
    -> (whitened rewards) -> the estimator's advantages -> Experience

Everything here is computed once per iteration, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from onecard.algorithms.ppo.estimators import ESTIMATORS, AdvantageInput, with_group_peers
from onecard.config import PPOConfig
from onecard.data.batches import Episode, Experience, ResponseTargets, TokenBatch, last_rows
from onecard.models.micro_batching import TokenBudget, forward_budget
from onecard.models.passes import per_token
from onecard.models.roles import Roles
from onecard.utils.errors import OnecardError
from onecard_kernels import masked_whiten, token_kl


@dataclass(frozen=True)
class ModelOutputs:
    """Log-probs and values of each episode: fp32 [k], one entry per response token, on the CPU.

    `values` is None without a critic. `last_values` fp32 [B]: the value of the state after the last token of a
    truncated answer, 0 for a finished one; None without `bootstrap_truncated`.
    """

    logprobs: list[Tensor]
    ref_logprobs: list[Tensor]
    values: list[Tensor] | None = None
    last_values: Tensor | None = None


@dataclass(frozen=True)
class ShapedRewards:
    """Padded tensors [B, T]: KL, rewards, values, advantages and returns.

    `mask` bool is True for the tokens of answers in the loss, False for padding and for skipped answers.
    """

    mask: Tensor
    kl: Tensor
    rewards: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor


def response_logprobs(
    roles: Roles, role: str, episodes: Sequence[Episode], config: PPOConfig, budget: TokenBudget
) -> list[Tensor]:
    """Log-probs of the sampled tokens under a role, at the temperature they were sampled with."""

    def read(batch: TokenBatch, targets: ResponseTargets) -> Tensor:
        return roles.logprobs(batch, targets, config.temperature)

    return per_token(roles, role, episodes, read, budget)


def state_values(roles: Roles, batch: TokenBatch) -> Tensor:
    """The active role's scalars of the states before each response token and after the last one."""
    rows, _ = torch.cat([batch.targets.rows, last_rows(batch)]).sort()
    return roles.scalars(batch, rows)


def response_values(roles: Roles, episodes: Sequence[Episode], budget: TokenBudget) -> list[Tensor]:
    """The critic's k + 1 values of each episode: of the states before each response token and after the last one.

    A state's value is read at the last token of that state, the row that predicts the next token.
    """

    def read(batch: TokenBatch, targets: ResponseTargets) -> Tensor:
        return state_values(roles, batch)

    return per_token(roles, "value", episodes, read, budget, extra=1)


def compute_model_outputs(
    roles: Roles, episodes: Sequence[Episode], config: PPOConfig, budget: TokenBudget | None = None
) -> ModelOutputs:
    """Forward passes of the policy, the reference, and the critic if there is one.

    `budget`: the run's token budget; by default a new one. Raises OnecardError if any result is NaN or infinite.
    """
    budget = budget or forward_budget(config)
    outputs = {
        "policy's log-probs": response_logprobs(roles, "policy", episodes, config, budget),
        "reference's log-probs": response_logprobs(roles, "reference", episodes, config, budget),
        "critic's values": response_values(roles, episodes, budget) if "value" in roles.adapters else [],
    }
    for name, pieces in outputs.items():
        if not all(bool(piece.isfinite().all()) for piece in pieces):
            raise OnecardError(
                f"ppo: the {name} of sampled answers are not finite: training has diverged, or the dtype overflows. A "
                "lower learning_rate or another dtype usually helps. The last checkpoint was written before that."
            )
    logprobs, ref_logprobs, values = outputs.values()
    last = [0.0 if episode.finished else float(each[-1]) for episode, each in zip(episodes, values, strict=False)]
    return ModelOutputs(
        logprobs,
        ref_logprobs,
        values=[each[:-1].clone() for each in values] if values else None,
        last_values=torch.tensor(last) if config.bootstrap_truncated else None,
    )


def pad(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors [k] of different lengths as one [B, T], padded with zeros."""
    return pad_sequence(list(pieces), batch_first=True)


def shape_rewards(
    outputs: ModelOutputs,
    scores: Tensor,
    kl_coef: float,
    config: PPOConfig,
    *,
    dense: Sequence[Tensor] | None = None,
    in_loss: Tensor | None = None,
) -> ShapedRewards:
    """Rewards, advantages and returns of an iteration.

        reward_t = -kl_coef * KL_t + dense_t + [t is the last response token] * score
        A_t = sum_l (gamma lam)^l (reward_{t+l} + gamma V_{t+l+1} - V_{t+l}),  return_t = A_t + V_t    (gae)

    `scores` fp32 [B]. The last response token is the stop token of a finished answer. `dense` fp32 [k] of each answer.
    Rewards are whitened before the advantages are computed, and keep their mean. `in_loss` bool [B]: the answers in the
    loss, by default all. The others are in no mean and no baseline: a skipped answer with a high score would make the
    advantages of all answers in the loss negative, and those answers less likely. With groups, an answer that is the
    only one of its group in the loss is skipped too.
    """
    lengths = torch.tensor([len(piece) for piece in outputs.logprobs])
    logprobs = pad(outputs.logprobs)
    mask = torch.arange(logprobs.shape[1]) < lengths.unsqueeze(1)
    kl = token_kl(logprobs, pad(outputs.ref_logprobs), estimator=config.kl_estimator)
    rewards = -kl_coef * kl
    if dense is not None:
        rewards += pad(dense)
    rewards[torch.arange(len(lengths)), lengths - 1] += scores
    if in_loss is not None:
        if config.has_groups:
            in_loss = with_group_peers(in_loss, config.num_generations)
        mask &= in_loss.unsqueeze(1)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    values = None if outputs.values is None else pad(outputs.values)
    estimated = ESTIMATORS[config.advantage_estimator](
        AdvantageInput(rewards, mask, values, outputs.last_values, config.gamma, config.lam, config.num_generations)
    )
    return ShapedRewards(mask, kl, rewards, values, estimated.advantages, estimated.returns)


def make_experiences(episodes: Sequence[Episode], outputs: ModelOutputs, shaped: ShapedRewards) -> list[Experience]:
    """An `Experience` for each episode that is in the loss."""
    return [
        Experience(
            episode=episode,
            old_logprobs=outputs.logprobs[row],
            old_values=None if outputs.values is None else outputs.values[row],
            advantages=shaped.advantages[row, : len(outputs.logprobs[row])].clone(),
            returns=shaped.returns[row, : len(outputs.logprobs[row])].clone(),
        )
        for row, episode in enumerate(episodes)
        if shaped.mask[row].any()
    ]


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that predicts the mean."""
    variance = float(returns.var(unbiased=False))
    return 1.0 - float((returns - values).var(unbiased=False)) / variance if variance > 0 else 0.0


def answer_metrics(
    episodes: Sequence[Episode], logprobs: Sequence[Tensor], ref_logprobs: Sequence[Tensor], scores: Tensor
) -> dict[str, float]:
    """Metrics of responses, in training and in evaluation."""
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
    episodes: Sequence[Episode],
    outputs: ModelOutputs,
    shaped: ShapedRewards,
    scores: Tensor,
    kl_coef: float,
    penalty: float = 0.0,
) -> dict[str, float]:
    """Metrics of an iteration's responses, by TRL's names. `penalty`: mean score subtracted by a constraint."""
    kl_reward = -kl_coef * shaped.kl.sum(1).mean()
    metrics = {
        **answer_metrics(episodes, outputs.logprobs, outputs.ref_logprobs, scores),
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": float(kl_reward),
        "objective/rlhf_reward": float(scores.mean() - penalty + kl_reward),
        "objective/entropy": float(-pad(outputs.logprobs).sum(1).mean()),
        "val/num_eos_tokens": float(sum(episode.finished for episode in episodes)),
    }
    if shaped.values is not None and shaped.mask.any():
        metrics["val/explained_variance"] = explained_variance(shaped.values[shaped.mask], shaped.returns[shaped.mask])
    return metrics


def next_kl_coef(kl_coef: float, kl: float, episodes: int, config: PPOConfig) -> float:
    """kl_coef for the next iteration: unchanged, or adapted so that the KL approaches adap_kl_target.

        e = clip(kl / target - 1, -0.2, 0.2);  kl_coef *= 1 + e * episodes / horizon

    "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593, section 2.2.
    """
    if not config.adap_kl_ctrl:
        return kl_coef
    error = min(max(kl / config.adap_kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / config.adap_kl_horizon)
