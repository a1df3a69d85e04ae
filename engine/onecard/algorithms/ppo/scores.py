"""Scores of responses, and their scale: with `--normalize_reward`, mean 0 and standard deviation 1 on the starting
policy's responses.

A reward's scale is arbitrary, but kl_coef, cliprange_value and the critic depend on it. "Learning to Summarize from
Human Feedback" (https://arxiv.org/abs/2009.01325) shifts its reward model so that references score 0. TRL's old
`use_score_scaling` and `use_score_norm` used running statistics, which change the objective during training; here mean
and standard deviation are measured once, before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from onecard.algorithms.ppo.constraint import cost_metrics
from onecard.algorithms.ppo.sampling import Sampler
from onecard.config import PPOConfig
from onecard.data import Prompt, stream_indices
from onecard.models.roles import Roles
from onecard.rewards.mixture import Scores
from onecard.rewards.scorer import Scorer
from onecard.utils.errors import OnecardError
from onecard.utils.progress import say
from onecard.utils.rng import seeded_rng

SCALE_PROMPTS = 64


@dataclass(frozen=True)
class Scale:
    """`mean` and `std` of the scores of the starting policy's responses; the default changes nothing."""

    mean: float = 0.0
    std: float = 1.0

    def of(self, scores: Scores) -> Scores:
        """(score - mean) / std of each answer; the mean is subtracted from the terminal part. `parts` are unchanged."""
        dense = None if scores.dense is None else [each / self.std for each in scores.dense]
        return replace(scores, terminal=(scores.terminal - self.mean) / self.std, dense=dense)


@dataclass(frozen=True)
class ScoredAnswers:
    """Scores and costs of B responses; `costs` fp32 [B], None without a constraint."""

    scores: Scores
    costs: Tensor | None = None


def score_metrics(scored: ScoredAnswers, config: PPOConfig) -> dict[str, float]:
    """Metrics of each reward, unscaled, and of the costs, in training and in evaluation."""
    parts = {f"rewards/{name}/mean": float(part.mean()) for name, part in scored.scores.parts.items()}
    return parts if scored.costs is None else {**parts, **cost_metrics(scored.costs, config)}


def measure_scale(
    roles: Roles, sampler: Sampler, scorer: Scorer, training: Sequence[Prompt], config: PPOConfig
) -> Scale:
    """The scale, from one response to each of the first (at most 64) prompts of training."""
    indices = stream_indices(len(training), 0, min(SCALE_PROMPTS, len(training)), seed=config.seed)
    prompts = [training[index] for index in indices]
    with seeded_rng(roles.device, config.seed, "normalize_reward"):
        episodes = sampler.sample(roles, prompts, None).episodes
        sums = scorer.scores(roles, sampler.tokenizer, prompts, episodes).sums.double()
    if sums.min() == sums.max():
        raise OnecardError(
            f"normalize_reward: {len(sums)} answers of the starting policy all score {float(sums[0]):g}, so their "
            "standard deviation is 0 and they cannot be scaled. Leave normalize_reward out, or check the reward."
        )
    scale = Scale(float(sums.mean()), float(sums.std(unbiased=False)))
    say(
        f"normalize_reward: scores are shifted by {-scale.mean:.6g} and divided by {scale.std:.6g}, from {len(sums)} "
        "answers of the starting policy."
    )
    return scale
