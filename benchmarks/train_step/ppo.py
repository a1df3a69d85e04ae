"""One PPO iteration by phase: the engine's own `PPO.step`, with a timer around its parts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import free_memory
from benchmarks.records import WHOLE
from benchmarks.train_step.cases import Flops, StepCase
from benchmarks.train_step.dpo import no_bar
from benchmarks.train_step.phases import OLD, OPTIMIZER, PHASES, REFERENCE, REWARD, ROLLOUT, TRAIN, VALUES, PhaseTimer
from benchmarks.train_step.synthetic import DTYPES, FIRST_WORD, SEED, random_pairs, random_weights, text
from onecard.algorithms.ppo import experience
from onecard.algorithms.ppo.job import PPO
from onecard.algorithms.ppo.sampling import Sampler, make_sampler
from onecard.config import PPOConfig, RewardConfig
from onecard.data import Prompt
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.micro_batching import forward_budget
from onecard.rewards.scorer import load_scorer
from onecard.training.run_folder import Run
from onecard.training.trainer import Trainer

PASS_OF = {"policy": OLD, "reference": REFERENCE}


def config_of(case: StepCase, folder: Path, dtype: torch.dtype) -> PPOConfig:
    """Settings: policy and critic are trained, with a reward adapter; two updates an iteration."""
    name = DTYPES[dtype]
    return PPOConfig(
        model=str(folder),
        dtype=name,
        load_in_4bit=case.load_in_4bit,
        adapter_dtype=name,
        gradient_checkpointing=case.gradient_checkpointing,
        optim=case.optim,
        reward_model_path=str(folder / "reward"),
        max_length=case.prompt + case.response + 1,
        response_length=case.response,
        batch_size=case.batch_size,
        per_device_train_batch_size=case.micro_batch_size,
        per_device_eval_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=max(1, case.batch_size // 2 // case.micro_batch_size),
        micro_batch_tokens=case.micro_batch_tokens,
        num_ppo_epochs=1,
        max_steps=1 << 30,
        lr_scheduler_type="constant",
    )


class PPORun:
    """PPO with a reward adapter and a critic adapter, one iteration at a time."""

    def __init__(self, case: StepCase, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device = case, device
        self.config = config_of(case, folder, dtype)
        with random_weights():
            write_reward(self.config)
            free_memory()
            self.roles = load_ppo_roles(self.config)
        tokenizer = load_tokenizer(self.config)
        sampler = make_sampler(self.config, self.roles, tokenizer)
        # With random weights every token is equally likely: mixed answers are half as long on average. Otherwise no
        # token ends an answer, and each is as long as the memory plan assumes.
        ends = range(FIRST_WORD, case.model.vocab, max(2, case.response // 2))
        sampler = replace(
            sampler, stop_tokens=sampler.stop_tokens | frozenset(ends) if case.mixed_lengths else frozenset()
        )
        budget = forward_budget(self.config)
        pairs = random_pairs(4 * case.batch_size, case.prompt, 2, case.model.vocab, mixed=case.mixed_lengths)
        # prompts of one length would need no mask, and the plan has one: every other prompt is a token shorter
        lacks = [0 if case.mixed_lengths else place % 2 for place in range(len(pairs))]
        drawn = [pair.prompt[lack:] for pair, lack in zip(pairs, lacks, strict=True)]
        prompts = [Prompt(text(prompt), prompt) for prompt in drawn]
        self.job = PPO(
            self.config, self.roles, sampler, load_scorer(self.config, budget), prompts, [], 1 << 30, budget=budget
        )
        self.trainer = Trainer(self.config, self.job, self.roles, Run(folder, None, ()))
        self.roles.train()
        self.first_micro_batch_sizes = self.micro_batch_sizes()
        self.order = self.job.batches(0)
        self.indices: list[int] = []  # of the last iteration's prompts
        self.episodes: list[Any] = []
        self.losses_and_grad_norms: list[tuple[float, float]] = []  # of each iteration

    def run(self, timer: PhaseTimer, *, again: bool = False) -> dict[str, float]:
        """One iteration; its row. The episodes are kept for counting.

        `again`: on the last one's prompts and random numbers, so that answers are hardly longer or shorter.
        """
        job, trainer, real_sample = self.job, self.trainer, Sampler.sample
        if again:
            trainer.step -= 1
        else:
            _, self.indices = next(self.order)

        def sample(*arguments: Any, **keywords: Any) -> Any:
            found = timer.wrap(ROLLOUT, real_sample)(*arguments, **keywords)
            self.episodes = list(found.episodes)
            return found

        def pass_of(roles: Any, role: str, *_: Any) -> str:
            return PASS_OF[role]

        with ExitStack() as stack:
            for target, name, changed in (
                (Sampler, "sample", sample),
                (job, "score", timer.wrap(REWARD, job.score)),
                (trainer, "compute_gradients", timer.wrap(TRAIN, trainer.compute_gradients)),
                (trainer, "optimizer_step", timer.wrap(OPTIMIZER, trainer.optimizer_step)),
                (experience, "response_logprobs", timer.wrap(pass_of, experience.response_logprobs)),
                (experience, "response_values", timer.wrap(VALUES, experience.response_values)),
            ):
                stack.enter_context(mock.patch.object(target, name, changed))
            with timer.whole():
                row = job.step(trainer, self.indices, no_bar())
        trainer.step += 1
        self.losses_and_grad_norms.append((row["loss"], row["grad_norm"]))
        return row

    def micro_batch_sizes(self) -> tuple[Any, ...]:
        """The limits on micro-batches now. They are smaller than at first if memory ran out."""
        return self.trainer.micro_batch_size, self.job.budget.size, self.job.sampler.budget.size

    def counts(self) -> dict[str, tuple[int, int]]:
        """(tokens, FLOPs that cannot be left out) of each phase of the last iteration."""
        found = {name: [0, 0] for name in (*PHASES, WHOLE)}
        for episode in self.episodes:
            tokens, response = len(episode), len(episode.sampling_logprobs)
            scored, unscored = Flops.of(self.case.model, tokens, response), Flops.of(self.case.model, tokens, 0)
            work = {
                # every token goes through once, with the keys and values of those before it at hand
                ROLLOUT: (response, scored.forward),
                REWARD: (tokens, unscored.forward),
                OLD: (tokens, scored.forward),
                REFERENCE: (tokens, scored.reference),
                VALUES: (tokens, unscored.forward),
                # policy, then critic
                TRAIN: (tokens, scored.forward + scored.backward + unscored.forward + unscored.backward),
                OPTIMIZER: (tokens, 0),
            }
            work[WHOLE] = (tokens, sum(flops for _, flops in work.values()))
            for name, (count, flops) in work.items():
                found[name][0] += count
                found[name][1] += flops
        return {name: (count, flops) for name, (count, flops) in found.items()}


def write_reward(ours: PPOConfig) -> None:
    """An untrained reward adapter on the same base, in the folder that the settings name."""
    torch.manual_seed(SEED)
    config = RewardConfig(model=ours.model, dtype=ours.dtype, load_in_4bit=ours.load_in_4bit)
    roles = load_roles(config, trained="reward", scalar=True)
    roles.export("reward", Path(ours.reward_model_path), load_tokenizer(config))
