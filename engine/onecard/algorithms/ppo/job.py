"""One iteration of PPO: sample responses, score them, compute advantages, make the optimizer steps."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from onecard.algorithms.ppo.constraint import apply_constraint, next_multiplier
from onecard.algorithms.ppo.evaluation import evaluate_policy
from onecard.algorithms.ppo.experience import (
    compute_model_outputs,
    make_experiences,
    next_kl_coef,
    objective_metrics,
    shape_rewards,
)
from onecard.algorithms.ppo.losses import ppo_objective
from onecard.algorithms.ppo.sampling import Sampler
from onecard.algorithms.ppo.scores import Scale, ScoredAnswers, score_metrics
from onecard.config import PPOConfig
from onecard.data import Prompt, stream_indices
from onecard.data.batches import Episode, Experience, ExperienceBatch
from onecard.models.micro_batching import TokenBudget, forward_budget
from onecard.models.roles import Roles
from onecard.rewards.scorer import Scorer
from onecard.training import run_folder
from onecard.training.metrics import phase_memory
from onecard.training.trainer import Objective, Trainer
from onecard.utils.progress import Bar
from onecard.utils.rng import seeded_rng

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


def learn(
    trainer: Trainer,
    objective: Objective[Experience, ExperienceBatch],
    batches: Iterator[list[Experience]],
    limit: float,
) -> dict[str, float]:
    """One optimizer step for each minibatch, until policy/approxkl exceeds `limit` (0: no limit).

    The gradient of that minibatch is discarded: the policy is too far from the one that sampled.
    """
    rows: list[dict[str, float]] = []
    updates = 0
    for minibatch in batches:
        rows.append(trainer.gradients(objective, minibatch))
        if limit and rows[-1]["policy/approxkl"] > limit:
            trainer.discard()
            break
        trainer.apply()
        updates += 1
    if not rows:  # a constraint has left no answer to learn from
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the schedule goes on all the same
        return {"policy/updates": 0.0}
    means = {
        logged: sum(row[name] for row in rows) / len(rows) for name, logged in UPDATE_METRICS.items() if name in rows[0]
    }
    ratio_var = sum((row["val/ratio"] - means["val/ratio"]) ** 2 for row in rows) / len(rows)
    return {**means, "val/ratio_var": ratio_var, "policy/updates": float(updates)}


@dataclass(frozen=True)
class Controls:
    """Values that carry over between iterations and go into checkpoints."""

    kl_coef: float
    multiplier: float  # lambda of constraint_mode lagrangian
    scale: Scale = field(default_factory=Scale)


def next_controls(controls: Controls, row: dict[str, float], episodes: int, config: PPOConfig) -> Controls:
    """The values for the next iteration, from this iteration's metrics."""
    kl_coef = next_kl_coef(controls.kl_coef, row["objective/kl"], episodes, config)
    if "constraint/lambda" not in row:
        return replace(controls, kl_coef=kl_coef)
    return replace(
        controls, kl_coef=kl_coef, multiplier=next_multiplier(controls.multiplier, row["constraint/cost"], config)
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
        self.rewards, self.constraint = scorer, constraint
        self.prompts, self.heldout, self.total_steps = prompts, heldout, total_steps
        # A warm-up begins at a rate of 0. An iteration is worth too much for that: this one begins a step later.
        self.schedule_from = 1 if config.warmup_steps else 0
        self.objective = ppo_objective(roles, config)
        self.budget = budget or forward_budget(config)  # of passes without gradients, which judges may share
        self.controls = Controls(config.kl_coef, config.constraint_lambda, scale or Scale())

    def batches(self, first_step: int) -> Iterator[tuple[float, list[int]]]:
        """The prompts of each iteration: a stream of shuffled epochs, cut every batch_size / num_generations."""
        size = self.config.episodes_per_step // self.config.num_generations
        for step in range(first_step, self.total_steps):
            indices = stream_indices(len(self.prompts), step * size, size, seed=self.config.seed)
            yield (step + 1) * size / len(self.prompts), indices

    def score(self, prompts: Sequence[Prompt], episodes: Sequence[Episode]) -> ScoredAnswers:
        """Scores on the run's scale, and costs where there is a constraint."""
        scorers = [self.rewards, *([self.constraint] if self.constraint else [])]
        scores, *costs = [each.scores(self.roles, self.sampler.tokenizer, prompts, episodes) for each in scorers]
        return ScoredAnswers(self.controls.scale.of(scores), costs[0].sums if costs else None)

    def step(self, trainer: Trainer, indices: Sequence[int], bar: Bar) -> dict[str, float]:
        began = time.perf_counter()
        config, roles, controls = self.config, self.roles, self.controls
        row: dict[str, float] = {}
        places = [index for index in indices for _ in range(config.num_generations)]
        prompts = [self.prompts[index] for index in places]
        with (
            bar.part("sample", len(places)) as part,
            phase_memory(row, "memory/rollout_gib"),
            seeded_rng(roles.device, config.seed, trainer.step, "sample"),
        ):
            sampled = self.sampler.sample(roles, prompts, places, part)
        episodes = sampled.episodes
        with seeded_rng(roles.device, config.seed, trainer.step, "judge"):
            scored = self.score(prompts, episodes)
        constrained = apply_constraint(scored.scores.total, scored.costs, controls.multiplier, config)
        passes = compute_model_outputs(roles, episodes, config, self.budget)
        shaped = shape_rewards(
            passes, constrained.scores, controls.kl_coef, config, dense=scored.scores.dense, kept=constrained.kept
        )
        paid = float((scored.scores.total - constrained.scores).mean())
        row |= objective_metrics(episodes, passes, shaped, scored.scores.sums, controls.kl_coef, paid)
        row |= score_metrics(scored, config)
        experiences = make_experiences(episodes, passes, shaped)
        updates = -(-len(experiences) // config.minibatch_size) * config.num_ppo_epochs
        with bar.part("learn", updates) as part, phase_memory(row, "memory/learn_gib"):
            counted = advancing(minibatches(experiences, config, trainer.step), part)
            row |= learn(trainer, self.objective, counted, config.target_kl)
        if self.constraint is not None and config.constraint_mode == "lagrangian":
            row["constraint/lambda"] = controls.multiplier
        self.controls = next_controls(controls, row, len(episodes), config)
        tokens = sum(map(len, episodes))
        trainer.num_tokens += tokens
        seconds = time.perf_counter() - began
        return {
            **row,
            "time/rollout_tokens_per_second": sampled.rollout.tokens_per_second,
            "time/rollout_share": sampled.rollout.seconds / seconds,
            "time/tokens_per_second": tokens / seconds,
        }

    def evaluate(self, trainer: Trainer, bar: Bar) -> dict[str, float]:
        """Metrics of responses to the held-out prompts; writes them to `samples.jsonl`."""
        if not self.heldout:
            return {}
        found = evaluate_policy(self.heldout, self.roles, self.sampler, self.score, self.config, self.budget, bar)
        for sample in found.samples:
            run_folder.log(trainer.run.folder, {"step": trainer.step, **sample}, run_folder.SAMPLES)
        return found.metrics

    def counts(self, step: int) -> dict[str, int]:
        return {"episode": step * self.config.episodes_per_step}

    def state(self) -> dict[str, Any]:
        tokens = {name: budget.size.tokens for name, budget in self.budgets().items()}
        return {"controls": asdict(self.controls), "tokens": tokens}

    def restore(self, state: dict[str, Any]) -> None:
        controls = state["controls"]
        self.controls = Controls(**{**controls, "scale": Scale(**controls["scale"])})
        for name, budget in self.budgets().items():
            budget.size = replace(budget.size, tokens=state["tokens"][name])

    def budgets(self) -> dict[str, TokenBudget]:
        """Token budgets that may have been halved during the run."""
        return {"passes": self.budget, "rollout": self.sampler.budget}


def advancing(batches: Iterator[list[Experience]], bar: Bar) -> Iterator[list[Experience]]:
    """The same minibatches; the progress bar advances after each."""
    for batch in batches:
        yield batch
        bar.advance()
