"""One PPO iteration, watched phase by phase: the engine's own `PPO.step`, with a stopwatch around its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.train_step.cases import Case, Flops
from benchmarks.train_step.dpo import forget, held_bytes, no_bar
from benchmarks.train_step.material import DTYPES, FIRST_WORD, SEED, draw_pairs, drawn_weights, text
from onecard.algorithms.ppo.job import PPO
from onecard.algorithms.ppo.sampling import make_sampler
from onecard.config import PPOConfig, RewardConfig
from onecard.data import Prompt
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.passes import looking_budget
from onecard.rewards.judge import load_judge
from onecard.runs import Run
from onecard.trainer import Trainer

ROLLOUT, REWARD, OLD, REFERENCE, VALUES = "rollout", "reward", "old log-probs", "reference log-probs", "values"
TRAIN, OPTIMIZER, WHOLE = "train", "optimizer", "the whole iteration"
PHASES = (ROLLOUT, REWARD, OLD, REFERENCE, VALUES, TRAIN, OPTIMIZER)
PASS_OF = {"policy": OLD, "reference": REFERENCE}
MARK = "phase: "


@dataclass
class Watch:
    """Seconds and peaks by phase, of one iteration. A phase that comes several times is added up."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # on a GPU: all that was allocated at once

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        began = self.clock()
        with torch.profiler.record_function(MARK + name):
            yield
        if on_gpu:
            torch.cuda.synchronize(self.device)
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - began

    def around(self, name: str | Callable[..., str], work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` as a phase; its name may depend on what `work` is given."""

        @wraps(work)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(*arguments, **keywords)):
                return work(*arguments, **keywords)

        return watched


class WatchedSampler:
    """The job's sampler, watched."""

    def __init__(self, sampler: Any, watch: Watch) -> None:
        self.sampler, self.sample = sampler, watch.around(ROLLOUT, sampler.sample)
        self.found: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


class Iterations:
    """PPO with a reward adapter and a critic adapter, one iteration at a time."""

    def __init__(self, case: Case, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.done = case, device, 0
        name = DTYPES[dtype]
        shared: dict[str, Any] = {"model": str(folder), "dtype": name, "load_in_4bit": case.load_in_4bit}
        reward = folder / "reward"
        with drawn_weights():
            write_reward(RewardConfig(**shared), reward)
            forget()
            self.config = PPOConfig(
                **shared,
                adapter_dtype=name,
                gradient_checkpointing=case.gradient_checkpointing,
                optim=case.optim,
                reward_model_path=str(reward),
                max_length=case.prompt + case.response + 1,
                response_length=case.response,
                batch_size=case.items,
                per_device_train_batch_size=case.per_pass,
                per_device_eval_batch_size=case.per_pass,
                gradient_accumulation_steps=max(1, case.items // 2 // case.per_pass),  # two updates in an iteration
                micro_batch_tokens=case.micro_batch_tokens,
                num_ppo_epochs=1,
                max_steps=1 << 30,
                lr_scheduler_type="constant",
            )
            self.roles = load_ppo_roles(self.config)
        tokenizer = load_tokenizer(self.config)
        sampler = make_sampler(self.config, self.roles, tokenizer)
        if case.mixed:  # of drawn weights each token is as likely as any: then answers are half as long on average
            ends = range(FIRST_WORD, case.model.vocab, max(2, case.response // 2))
            sampler = replace(sampler, ends=sampler.ends | frozenset(ends))
        budget = looking_budget(self.config)
        prompts = [
            Prompt(text(pair.prompt), pair.prompt)
            for pair in draw_pairs(4 * case.items, case.prompt, 2, case.model.vocab, mixed=case.mixed)
        ]
        self.job = PPO(
            self.config, self.roles, sampler, load_judge(self.config, budget), prompts, [], 1 << 30, budget=budget
        )
        self.trainer = Trainer(self.config, self.job, self.roles, Run(folder, None, ()))
        self.roles.train()
        self.order = self.job.batches(0)
        self.episodes: list[Any] = []

    def run(self, watch: Watch) -> dict[str, float]:
        """One iteration; its row. The episodes are kept for counting."""
        job, trainer = self.job, self.trainer
        module = "onecard.algorithms.ppo.experience"
        from onecard.algorithms.ppo import experience

        sampler = WatchedSampler(job.sampler, watch)
        kept = sampler.sample

        def sample(*arguments: Any, **keywords: Any) -> Any:
            found = kept(*arguments, **keywords)
            self.episodes = list(found.episodes)
            return found

        sampler.sample = sample

        def which(roles: Any, role: str, *_: Any) -> str:
            return PASS_OF[role]

        _, indices = next(self.order)
        with ExitStack() as stack:
            for target, name, changed in (
                (job, "sampler", sampler),
                (job, "judge", watch.around(REWARD, job.judge)),
                (trainer, "gradients", watch.around(TRAIN, trainer.gradients)),
                (trainer, "apply", watch.around(OPTIMIZER, trainer.apply)),
            ):
                stack.enter_context(mock.patch.object(target, name, changed))
            for name, phase in (("logprobs_of", which), ("values_of", VALUES)):
                changed = watch.around(phase, getattr(experience, name))
                stack.enter_context(mock.patch(f"{module}.{name}", changed))
            with watch.phase(WHOLE) if self.device.type == "cpu" else whole(watch):
                row = job.step(trainer, indices, no_bar())
        trainer.step += 1
        self.done += 1
        return row

    def held(self) -> int:
        """Bytes that stay between iterations."""
        return held_bytes(self.roles, self.trainer.optimizer)

    def counts(self) -> dict[str, tuple[int, int]]:
        """(tokens, FLOPs that cannot be left out) of each phase of the last iteration."""
        model = self.case.model
        found: dict[str, list[int]] = {name: [0, 0] for name in (*PHASES, WHOLE)}
        for episode in self.episodes:
            tokens, scored = len(episode), len(episode.sampling_logprobs)
            spoken, silent = Flops.of(model, tokens, scored), Flops.of(model, tokens, 0)
            work = {
                # every token goes through once, with the keys and values of those before it at hand
                ROLLOUT: (scored, spoken.forward),
                REWARD: (tokens, silent.forward),
                OLD: (tokens, spoken.forward),
                REFERENCE: (tokens, spoken.reference),
                VALUES: (tokens, silent.forward),
                # policy, then critic
                TRAIN: (tokens, spoken.forward + spoken.backward + silent.forward + silent.backward),
            }
            for name, (count, flops) in work.items():
                found[name][0] += count
                found[name][1] += flops
                found[WHOLE][1] += flops
            found[OPTIMIZER][0] += tokens
            found[WHOLE][0] += tokens
        return {name: (count, flops) for name, (count, flops) in found.items()}


@contextmanager
def whole(watch: Watch) -> Iterator[None]:
    """The whole iteration's seconds where its phases reset the peak: its own is the highest of theirs."""
    began = watch.clock()
    yield
    torch.cuda.synchronize(watch.device)
    watch.seconds[WHOLE] = watch.clock() - began
    watch.peaks[WHOLE] = max(watch.peaks.values())


def write_reward(config: RewardConfig, folder: Path) -> None:
    """A reward adapter that nobody trained."""
    torch.manual_seed(SEED)
    roles = load_roles(config, trained="reward", scalar=True)
    roles.export("reward", folder, load_tokenizer(config))


def phase_peaks(work: Callable[[Watch], Any], device: torch.device) -> dict[str, int]:
    """The most that each phase held above what was there before the iteration. A pass of its own, never timed.

    On a CPU it is the running sum of the profiler's allocations between a phase's beginning and its end.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before, watch = torch.cuda.memory_allocated(device), Watch(device)
        work(watch)
        return {name: peak - before for name, peak in watch.peaks.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work(Watch(device))
    changes, spans = [], []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith(MARK):
            spans.append((event.name().removeprefix(MARK), event.start_ns(), event.start_ns() + event.duration_ns()))
    return peaks_within(changes, spans)


def peaks_within(changes: list[tuple[int, int]], spans: list[tuple[str, int, int]]) -> dict[str, int]:
    """The highest running sum of `(when, bytes)` within each `(name, from, to)`, with what was there when it began."""
    peaks: dict[str, int] = {}
    ordered = sorted(changes, key=lambda change: change[0])
    for name, start, stop in spans:
        total, peak = 0, None
        for when, size in ordered:
            if when > stop:
                break
            if when >= start and peak is None:
                peak = total
            total += size
            if when >= start:
                peak = max(peak or 0, total)
        peaks[name] = max(peaks.get(name, 0), total if peak is None else peak)
    return peaks
