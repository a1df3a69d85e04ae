"""One PPO iteration for the stopwatch, one for the profiler."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import decoding, measure
from benchmarks.train_step.cases import Case, Flops
from benchmarks.train_step.limits import BareProducts, capped
from benchmarks.train_step.material import FIRST_WORD, write_folder
from benchmarks.train_step.ppo import Iterations
from benchmarks.train_step.watch import PHASES, ROLLOUT, WHOLE, Watch
from benchmarks.where_time_goes.costs import Phase
from benchmarks.where_time_goes.digest import Digest, profiled
from onecard.data import Prompt

LONGEST = 64  # tokens of an answer up to which a whole rollout is profiled; of longer ones so many in their middle:
WINDOW = 24


@dataclass
class FirstTimes(Watch):
    """Keeps the seconds of each phase's first time apart: that is what is profiled of a phase which comes again."""

    first: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.seconds.get(name, 0.0)
        with super().phase(name):
            yield
        self.first.setdefault(name, self.seconds[name] - before)


@dataclass
class Profiler(Watch):
    """Profiles the first time of each phase that is asked for, and reads the profile at once."""

    wanted: tuple[str, ...] = ()
    found: dict[str, Digest] = field(default_factory=dict)

    def around(self, name: str | Callable[..., str], work: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            phase = name if isinstance(name, str) else name(*arguments, **keywords)
            if phase not in self.wanted or phase in self.found:
                return work(*arguments, **keywords)
            results: list[Any] = []
            self.found[phase] = profiled(lambda: results.append(work(*arguments, **keywords)), self.device)
            return results[0]

        return watched

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Measured:
    """An iteration: its phases, the whole in seconds, and the rates of this machine in the same run."""

    phases: tuple[Phase, ...]
    seconds: float
    profiled_seconds: float  # of the iteration that was profiled
    rate: float  # FLOP/s of bare products
    bandwidth: float  # bytes/s of a plain copy
    tokens: dict[str, int]


def measured(case: Case, device: torch.device, dtype: torch.dtype, tell: Callable[[str], None]) -> Measured:
    """Warm up, watch an iteration, then profile one."""
    with tempfile.TemporaryDirectory() as folder, capped(case.cap_gib, device):
        write_folder(case.model, Path(folder))
        tell("loading")
        iterations = Iterations(case, Path(folder), device, dtype)
        tell("a first iteration, which is not watched")
        sampler = iterations.job.sampler  # warm after short answers
        few = replace(sampler, sampling=replace(sampler.sampling, max_new_tokens=min(case.response, LONGEST)))
        with mock.patch.object(iterations.job, "sampler", few):
            iterations.run(Watch(device))
        tell("the stopwatch")
        watch = FirstTimes(device)
        iterations.run(watch)
        counts, batches = iterations.counts(), decode_steps(iterations)
        rate, copies = product_rate(case, device, dtype), decoding.bandwidth(device)
        tell("the profiler")
        whole = case.response <= LONGEST
        profiler = Profiler(device, wanted=PHASES if whole else tuple(name for name in PHASES if name != ROLLOUT))
        began = time.perf_counter()
        iterations.run(profiler, again=True)
        taken = time.perf_counter() - began
        again = iterations.counts()
        model, length = iterations.roles.causal_model(), case.prompt + case.response // 2
        a_step = decoding.weight_bytes(model) / copies
        phases = []
        for name, digest in profiler.found.items():
            # a few other tokens may be drawn after another update
            share = again[name][0] / counts[name][0]
            part = watch.first[name] * share
            reading = batches * share * a_step if name == ROLLOUT else 0.0
            phases.append(Phase(name, watch.seconds[name], counts[name][1], part, digest, reading))
        if not whole:
            tell(f"the profiler: {WINDOW} tokens in the middle of answers")
            part, digest = window(iterations, length, device)
            phases.insert(0, Phase(ROLLOUT, watch.seconds[ROLLOUT], counts[ROLLOUT][1], part, digest, WINDOW * a_step))
    order = {name: place for place, name in enumerate(PHASES)}
    phases.sort(key=lambda phase: order[phase.name])
    tokens = {name: count for name, (count, _) in counts.items()}
    return Measured(tuple(phases), watch.seconds[WHOLE], taken, rate, copies, tokens)


def decode_steps(iterations: Iterations) -> int:
    """Passes over single tokens of a rollout in batches by like lengths: at least the longest answer's of each."""
    answers = sorted((len(each.sampling_logprobs) for each in iterations.episodes), reverse=True)
    batches = -(-len(answers) // iterations.config.local_rollout_forward_batch_size)
    return max(1, batches) * answers[0]


def product_rate(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of bare products of a micro-batch's rows."""
    length = case.prompt + case.response
    rows = max(case.per_pass * length, case.micro_batch_tokens)
    step = case.items * Flops.of(case.model, length, case.response).forward
    bare, seconds = BareProducts(case, device, dtype, rows, step), measure.stopwatch(device)
    return bare.flops / statistics.median(seconds(bare) for _ in range(5))


def window(iterations: Iterations, length: int, device: torch.device) -> tuple[float, Digest]:
    """Seconds and digest of WINDOW tokens that follow prompts of so many: those of more tokens less those of one.

    Nothing ends an answer there. The seconds are the stopwatch's, of calls that nobody profiles.
    """
    job, roles = iterations.job, iterations.roles
    draw = random.Random(length)
    words = tuple(draw.randrange(FIRST_WORD, iterations.case.model.vocab) for _ in range(length))
    prompts = [Prompt("", words[place % 2 :]) for place in range(iterations.case.items)]

    def sample(tokens: int) -> None:
        sampling = replace(job.sampler.sampling, max_new_tokens=tokens)
        replace(job.sampler, sampling=sampling, ends=frozenset()).sample(roles, prompts, range(len(prompts)), None)

    seconds = measure.stopwatch(device)
    sample(1 + WINDOW)  # what is made in a first call is not the window's
    taken = [seconds(lambda: sample(1 + WINDOW)) - seconds(lambda: sample(1)) for _ in range(3)]
    digest = profiled(lambda: sample(1 + WINDOW), device).beyond(profiled(lambda: sample(1), device))
    return max(statistics.median(taken), 1e-9), digest
