"""PPO: sample responses, score them, compute advantages, make optimizer steps on the clipped losses."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from onecard.algorithms.ppo.constraint import apply_constraint, next_multiplier
from onecard.algorithms.ppo.evaluation import evaluate_policy
from onecard.algorithms.ppo.experience import (
    compute_model_outputs,
    make_experiences,
    next_kl_coef,
    objective_metrics,
    shape_rewards,
)
from onecard.algorithms.ppo.sampling import Sampler
from onecard.algorithms.ppo.scores import Scale, ScoredAnswers, score_metrics
from onecard.config import PPOConfig
from onecard.data import Prompt, stream_indices
from onecard.data.batches import Episode, Experience, ExperienceBatch, pack_experience
from onecard.models.micro_batching import TokenBudget, forward_budget
from onecard.models.roles import Roles
from onecard.rewards.scorer import Scorer
from onecard.rollout import Rollout
from onecard.training import run_folder
from onecard.training.metrics import phase_memory
from onecard.training.trainer import Objective, Trainer
from onecard.utils.progress import Bar
from onecard.utils.rng import seeded_rng
from onecard_kernels import Loss, linear_ppo_loss, value_loss

NO_CLIP = (1.0, 1e12)  # clip_low and clip_high without effect: the kernels keep the ratio between 0 and e^20

# Logged as means over the updates of an iteration, under TRL's names.
UPDATE_METRICS = {
    "loss": "loss",
    "loss/policy": "loss/policy_avg",
    "loss/value": "loss/value_avg",
    "policy/approxkl": "policy/approxkl_avg",
    "policy/clipfrac": "policy/clipfrac_avg",
    "policy/entropy": "policy/entropy_avg",
    "val/clipfrac": "val/clipfrac_avg",
    "val/ratio": "val/ratio",
    "grad_norm": "grad_norm",
}


def minibatches(experiences: Sequence[Experience], config: PPOConfig, step: int) -> Iterator[list[Experience]]:
    """Minibatches of num_ppo_epochs passes over the experiences; each pass has its own order."""
    size = config.minibatch_size
    for epoch in range(config.num_ppo_epochs):
        order = list(range(len(experiences)))
        random.Random(f"{config.seed} {step} {epoch}").shuffle(order)
        for start in range(0, len(order), size):
            yield [experiences[index] for index in order[start : start + size]]


def ppo_losses(roles: Roles, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Iterator[Loss]:
    """The policy's clipped surrogate, and vf_coef times the critic's clipped squared error where there is a critic.

    Estimators with one pass over the responses (a2c, reinforce) do not clip. A critic with its own adapter yields a
    second loss: the trainer runs the policy's backward first, so only one role's activations are in memory. The loss of
    a critic on the policy's trunk is added to the policy's loss, because both use the same forward pass.
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
    del policy, hidden  # free the policy's tensors before the critic's forward pass
    if "value" in roles.adapters:
        with roles.active("value"):
            yield critic_loss(roles.scalars(batch.sequences, targets.rows), batch, config, normalizer)


def critic_loss(values: Tensor, batch: ExperienceBatch, config: PPOConfig, normalizer: int) -> Loss:
    """The clipped squared error of the critic's values, times vf_coef."""
    if batch.old_values is None:
        raise ValueError("old_values is None, expected the critic's values")
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
    """The objective of each optimizer step of PPO, normalised by response tokens."""
    return Objective(
        collate=pack_experience,
        count=lambda experiences: sum(experience.num_response_tokens for experience in experiences),
        losses=lambda batch, normalizer: ppo_losses(roles, batch, config, normalizer),
    )


def update_metrics(rows: Sequence[dict[str, float]], updates: int) -> dict[str, float]:
    """Means over the minibatches of an iteration. `updates`: the number of optimizer steps."""
    if not rows:  # a constraint skipped all responses
        return {"policy/updates": 0.0}
    means = {
        logged: sum(row[name] for row in rows) / len(rows) for name, logged in UPDATE_METRICS.items() if name in rows[0]
    }
    ratio_var = sum((row["val/ratio"] - means["val/ratio"]) ** 2 for row in rows) / len(rows)
    return {**means, "val/ratio_var": ratio_var, "policy/updates": float(updates)}


@dataclass(frozen=True)
class Collected:
    """The experiences of an iteration, its metrics before learning, and the sampled episodes with their rollout."""

    experiences: list[Experience]
    metrics: dict[str, float]
    episodes: Sequence[Episode]
    rollout: Rollout


@dataclass(frozen=True)
class AdaptiveState:
    """Values that an iteration passes to the next one, and that checkpoints save."""

    kl_coef: float
    multiplier: float  # lambda of constraint_mode lagrangian
    scale: Scale = field(default_factory=Scale)  # of normalize_reward: measured at the start, then constant


def next_adaptive_state(
    adaptive: AdaptiveState, row: dict[str, float], episodes: int, config: PPOConfig
) -> AdaptiveState:
    """The values for the next iteration, from this iteration's metrics."""
    kl_coef = next_kl_coef(adaptive.kl_coef, row["objective/kl"], episodes, config)
    if "constraint/lambda" not in row:  # logged only in constraint_mode lagrangian
        return replace(adaptive, kl_coef=kl_coef)
    return replace(
        adaptive, kl_coef=kl_coef, multiplier=next_multiplier(adaptive.multiplier, row["constraint/cost"], config)
    )


class PPO:
    """A `Job`: each step is one iteration of sampling, scoring and learning."""

    name = "ppo"

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        sampler: Sampler,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        heldout: Sequence[Prompt],
        total_steps: int,
        *,
        constraint: Scorer | None = None,
        scale: Scale | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        self.config, self.roles, self.sampler = config, roles, sampler
        self.reward_scorer, self.constraint = scorer, constraint
        self.prompts, self.heldout, self.total_steps = prompts, heldout, total_steps
        # Warm-up starts at a learning rate of 0, which would waste an iteration: skip that step of the schedule.
        self.first_schedule_step = 1 if config.warmup_steps else 0
        self.objective = ppo_objective(roles, config)
        self.budget = budget or forward_budget(config)  # of passes without gradients
        self.adaptive = AdaptiveState(config.kl_coef, config.constraint_lambda, scale or Scale())

    def batches(self, first_step: int) -> Iterator[tuple[float, list[int]]]:
        """The prompts of each iteration (episodes_per_step / num_generations), from a stream of shuffled epochs."""
        size = self.config.episodes_per_step // self.config.num_generations
        for step in range(first_step, self.total_steps):
            indices = stream_indices(len(self.prompts), step * size, size, seed=self.config.seed)
            yield (step + 1) * size / len(self.prompts), indices

    def score(self, prompts: Sequence[Prompt], episodes: Sequence[Episode]) -> ScoredAnswers:
        """Scores, scaled by `AdaptiveState.scale`, and costs if there is a constraint."""
        scorers = [self.reward_scorer, *([self.constraint] if self.constraint else [])]
        scores, *costs = [scorer.scores(self.roles, self.sampler.tokenizer, prompts, episodes) for scorer in scorers]
        return ScoredAnswers(self.adaptive.scale.of(scores), costs[0].sums if costs else None)

    def collect(self, step: int, indices: Sequence[int], bar: Bar) -> Collected:
        """Sample responses to these prompts, score them, and compute their advantages."""
        config, roles, adaptive = self.config, self.roles, self.adaptive
        row: dict[str, float] = {}
        prompts = [self.prompts[index] for index in indices for _ in range(config.num_generations)]
        with (
            bar.part("sample", len(prompts)) as part,
            phase_memory(row, "memory/rollout_gib"),
            seeded_rng(roles.device, config.seed, step, "sample"),
        ):
            sampled = self.sampler.sample(roles, prompts, part)
        episodes = sampled.episodes
        with seeded_rng(roles.device, config.seed, step, "judge"):
            scored = self.score(prompts, episodes)
        constrained = apply_constraint(scored.scores.terminal, scored.costs, adaptive.multiplier, config)
        outputs = compute_model_outputs(roles, episodes, config, self.budget)
        shaped = shape_rewards(
            outputs,
            constrained.scores,
            adaptive.kl_coef,
            config,
            dense=scored.scores.dense,
            in_loss=constrained.in_loss,
        )
        penalty = float((scored.scores.terminal - constrained.scores).mean())
        row |= objective_metrics(episodes, outputs, shaped, scored.scores.sums, adaptive.kl_coef, penalty)
        row |= score_metrics(scored, config)
        return Collected(make_experiences(episodes, outputs, shaped), row, episodes, sampled.rollout)

    def step(self, trainer: Trainer, indices: Sequence[int], bar: Bar) -> dict[str, float]:
        """One iteration. It ends early when a minibatch's policy/approxkl exceeds `target_kl`.

        The gradient of that minibatch is discarded: the policy is too far from the one that sampled the responses.
        """
        began = time.perf_counter()
        config = self.config
        collected = self.collect(trainer.step, indices, bar)
        row, rows, updates = dict(collected.metrics), list[dict[str, float]](), 0
        num_minibatches = math.ceil(len(collected.experiences) / config.minibatch_size) * config.num_ppo_epochs
        with bar.part("learn", num_minibatches) as part, phase_memory(row, "memory/learn_gib"):
            for minibatch in minibatches(collected.experiences, config, trainer.step):
                rows.append(trainer.compute_gradients(self.objective, minibatch))
                part.advance()
                if config.target_kl and rows[-1]["policy/approxkl"] > config.target_kl:
                    trainer.zero_grad()
                    break
                trainer.optimizer_step()
                updates += 1
        if not updates:  # the learning rate schedule steps even without an optimizer step, and PyTorch would warn
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        row |= update_metrics(rows, updates)
        if self.constraint is not None and config.constraint_mode == "lagrangian":
            row["constraint/lambda"] = self.adaptive.multiplier
        self.adaptive = next_adaptive_state(self.adaptive, row, len(collected.episodes), config)
        tokens = sum(map(len, collected.episodes))
        trainer.num_tokens += tokens
        seconds = time.perf_counter() - began
        return {
            **row,
            "time/rollout_tokens_per_second": collected.rollout.tokens_per_second,
            "time/rollout_share": collected.rollout.seconds / seconds,
            "time/tokens_per_second": tokens / seconds,
        }

    def evaluate(self, trainer: Trainer, bar: Bar) -> dict[str, float]:
        """Metrics of responses to the held-out prompts; writes them to `samples.jsonl`."""
        if not self.heldout:
            return {}
        evaluation = evaluate_policy(self.heldout, self.roles, self.sampler, self.score, self.config, self.budget, bar)
        for sample in evaluation.samples:
            run_folder.log(trainer.run.folder, {"step": trainer.step, **sample}, run_folder.SAMPLES)
        return evaluation.metrics

    def counts(self, step: int) -> dict[str, int]:
        return {"episode": step * self.config.episodes_per_step}

    def state(self) -> dict[str, Any]:
        # the `tokens` of the rollout's budget are bytes of the KV cache
        tokens = {name: budget.size.tokens for name, budget in self.budgets().items()}
        return {"controls": asdict(self.adaptive), "tokens": tokens}

    def restore(self, state: dict[str, Any]) -> None:
        adaptive = state["controls"]
        self.adaptive = AdaptiveState(**{**adaptive, "scale": Scale(**adaptive["scale"])})
        for name, budget in self.budgets().items():
            budget.size = replace(budget.size, tokens=state["tokens"][name])

    def budgets(self) -> dict[str, TokenBudget]:
        """The token budgets that out-of-memory errors may reduce, by their names in checkpoints."""
        return {"passes": self.budget, "rollout": self.sampler.budget}
