"""The samplers, what they are judged by, and how they are timed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import decoding, measure
from benchmarks.rollout.cases import Task
from benchmarks.rollout.record import OURS, PEER, RECORDED, Row, Step
from onecard.data.batches import TokenSequence, pack, to_device
from onecard.rollout import Sampling, sample_responses
from onecard.rollout.cuda_graphs import cuda_graph, recorded_by

BAR = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # nats by which a log-probability as drawn may be off
CHECKED, CHECKED_TOKENS = 8, 32  # responses that are compared, of at most so many tokens: no long rollout is wrong anew
WINDOW = 32  # tokens over which a step of decoding is timed
STEP_REPEATS = 3
NEVER = 1 << 30  # an id that no token has


def ours(task: Task) -> int:
    """Response tokens of our sampler."""
    return sum(len(response.tokens) for response in sampled(task).responses)


def recorded(task: Task) -> int:
    """The same, with passes that are recorded as CUDA graphs and replayed."""
    with recorded_by(cuda_graph):
        return ours(task)


def sampled(task: Task) -> Any:
    return sample_responses(task.roles, task.prompts, task.sampling, stop_tokens=task.ends, batch_size=task.batch_size)


def peer(task: Task) -> int:
    """Response tokens of transformers' `generate`."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, temperature=task.sampling.temperature, top_k=0, top_p=1.0, pad_token_id=task.pad,
        max_new_tokens=task.sampling.max_new_tokens, eos_token_id=sorted(task.ends) or [NEVER],
    )  # fmt: skip
    order = sorted(task.prompts, key=len, reverse=True)
    total = 0
    with torch.no_grad():
        for start in range(0, len(order), task.batch_size):
            part = order[start : start + task.batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[task.pad] * (width - len(row)) + list(row) for row in part], device=task.roles.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part], device=task.roles.device)
            out = task.roles.causal_model().generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            total += sum(ended_length(row, task.ends) for row in out[:, width:].tolist())
    return total


Samplers = dict[str, tuple[str, Callable[[Task], int]]]
SAMPLERS: dict[str, Samplers] = {
    "cpu": {OURS: ("ours", ours), PEER: ("peer", peer)},
    "cuda": {OURS: ("ours", ours), RECORDED: ("ours", recorded), PEER: ("peer", peer)},
}


def ended_length(tokens: Sequence[int], ends: Collection[int]) -> int:
    """Tokens up to and with the first that ends."""
    return next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))


@torch.no_grad()
def error_of_ours(task: Task) -> float:
    """The largest difference between a log-probability as drawn and the same of one pass over the finished sequence."""
    torch.manual_seed(0)
    short = min(task.sampling.max_new_tokens, CHECKED_TOKENS)
    task = replace(task, sampling=replace(task.sampling, max_new_tokens=short))
    worst = 0.0
    for prompt, response in list(zip(task.prompts, sampled(task).responses, strict=True))[:CHECKED]:
        mask = (False,) * len(prompt) + (True,) * len(response.tokens)
        batch = pack([TokenSequence(prompt + response.tokens, mask)])
        targets = to_device(batch.targets, task.roles.device)
        batch = to_device(batch, task.roles.device)
        own = task.roles.logprobs(batch, targets, temperature=task.sampling.temperature)
        worst = max(worst, (own.cpu() - response.logprobs).abs().max().item())
    return worst


class Work:
    """A sampler with its task, called in turns: it keeps the tokens of each call, and a GPU's peak."""

    def __init__(self, task: Task, sampler: Callable[[Task], int], device: torch.device) -> None:
        self.task, self.sampler, self.device = task, sampler, device
        self.tokens: list[int] = []
        self.before, self.peak = 0, 0

    def ready(self) -> None:
        torch.manual_seed(len(self.tokens))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def __call__(self) -> None:
        self.tokens.append(self.sampler(self.task))
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - self.before)


def take_turns(
    task: Task,
    device: torch.device,
    repeats: int,
    *,
    budget: float = float("inf"),
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Row, ...]:
    """All samplers, timed in turns on the same seeds; no round is begun once they have taken `budget` seconds."""
    samplers = SAMPLERS[device.type]
    works = {name: Work(task, sampler, device) for name, (_, sampler) in samplers.items()}
    seconds_of = measure.stopwatch(device, clock)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-warmup, repeats):
        if turn > 0 and sum(map(sum, times.values())) > budget:
            break
        for name, work in works.items():
            taken = seconds_of(work)
            if turn >= 0:
                times[name].append(taken)

    def row(name: str) -> Row:
        tokens = tuple(works[name].tokens[warmup:])
        rates = [count / seconds for count, seconds in zip(tokens, times[name], strict=True)]
        peak = works[name].peak if device.type == "cuda" else measure.peak_bytes(works[name], device)
        return Row(name, samplers[name][0], tuple(times[name]), tokens, measure.spread(rates), peak)

    return tuple(map(row, samplers))


def ratio_of(first: Row, second: Row) -> measure.Spread:
    """Tokens per second of one over the other's, round by round: what slowed a round falls on both."""
    rates = [[count / taken for count, taken in zip(row.tokens, row.seconds, strict=True)] for row in (first, second)]
    return measure.spread([one / other for one, other in zip(*rates, strict=True)])


def time_a_step(
    task: Task, device: torch.device, bandwidth: float, clock: Callable[[], float] = time.perf_counter
) -> Step:
    """Seconds of one step over a full batch in which nothing ends, in the middle of the longest answers.

    What more tokens take beyond one, over their number: so the pass over the prompts does not count, and nothing needs
    to be known of how a sampler steps.
    """
    tokens = min(WINDOW, max(1, task.sampling.max_new_tokens // 2))
    length = max(map(len, task.prompts)) + task.sampling.max_new_tokens // 2 - tokens // 2
    words = [word for prompt in task.prompts for word in prompt]
    draw = random.Random(0)
    # of one length no mask would be needed, and real batches need one
    prompts = tuple(tuple(draw.choices(words, k=max(1, length - row % 2))) for row in range(task.batch_size))

    def of(count: int) -> Task:
        return replace(task, prompts=prompts, ends=frozenset(), sampling=Sampling(count, task.sampling.temperature))

    seconds_of, samplers = measure.stopwatch(device, clock), SAMPLERS[device.type]
    found: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(-1, STEP_REPEATS):
        for name, (_, sampler) in samplers.items():
            many, one = (seconds_of(Work(of(count), sampler, device)) for count in (1 + tokens, 1))
            if turn >= 0:
                found[name].append((many - one) / tokens)
    size = decoding.step_bytes(task.roles.causal_model(), task.batch_size, length + tokens // 2)
    seconds = {name: statistics.median(each) for name, each in found.items()}
    return Step(task.batch_size, length + tokens // 2, seconds, size, bandwidth)
