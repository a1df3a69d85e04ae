"""Evaluation of the policy: answers to held-out prompts, scored as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.algorithms.ppo.experience import answer_metrics, response_logprobs
from onecard.algorithms.ppo.sampling import Sampler
from onecard.algorithms.ppo.scores import ScoredAnswers, score_metrics
from onecard.config import PPOConfig
from onecard.data import Prompt
from onecard.data.batches import Episode
from onecard.models.micro_batching import TokenBudget
from onecard.models.roles import Roles
from onecard.rewards.scorer import response_text
from onecard.utils.progress import Bar
from onecard.utils.rng import seeded_rng

EVALUATED_PROMPTS = 128  # the mean score then has a standard error of a tenth of the standard deviation
SHOWN_SAMPLES = 8


@dataclass(frozen=True)
class HeldoutResult:
    """Metrics over the responses, and the first few responses."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def evaluate_policy(
    heldout: Sequence[Prompt],
    roles: Roles,
    sampler: Sampler,
    score: Callable[[Sequence[Prompt], Sequence[Episode]], ScoredAnswers],
    config: PPOConfig,
    budget: TokenBudget,
    bar: Bar,
) -> HeldoutResult:
    """Sample and score one response to each of at most 128 prompts, always with the same seed."""
    prompts = heldout[:EVALUATED_PROMPTS]
    with bar.part("evaluate", len(prompts)) as part, seeded_rng(roles.device, config.seed, "evaluate"):
        episodes = sampler.sample(roles, prompts, part).episodes
        scored = score(prompts, episodes)
    logprobs, ref_logprobs = (
        response_logprobs(roles, role, episodes, config, budget) for role in ("policy", "reference")
    )
    scores = scored.scores.sums
    metrics = answer_metrics(episodes, logprobs, ref_logprobs, scores)
    metrics |= score_metrics(scored, config)
    shown = zip(prompts[:SHOWN_SAMPLES], episodes, scores.tolist(), strict=False)
    samples = [
        {"prompt": prompt.text, "completion": response_text(sampler.tokenizer, episode), "score": value}
        for prompt, episode, value in shown
    ]
    return HeldoutResult(metrics, samples)
