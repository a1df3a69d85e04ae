"""`python -m benchmarks.rollout`: response tokens per second, ours against transformers' `generate`. Writes JSON.

Both get the same batches of prompts (sorted by length), the same model object, temperature, end tokens and length
limit, and take turns in one process. Each draws its own random numbers, so what is counted is the tokens of responses,
up to and with the one that ended each; columns that only hold padding behind an end are no work done. `generate` keeps
no log-probabilities here, and ours does: a trainer would have to ask `generate` for its scores on top.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import measure, options, records
from benchmarks.cases import Refused
from benchmarks.kernels import main as guarded
from benchmarks.kernels import ready_device
from onecard.batches import TokenSequence, pack, to_device
from onecard.config import ModelConfig
from onecard.data import load_rows
from onecard.errors import OnecardError
from onecard.models.build import load_player
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Sampling, end_tokens, sample_responses

BENCHMARK = "rollout"
OURS, PEER = "onecard", "transformers generate"
RANDOM = "random Llama"
ENDING_SHARE = 32  # of the random model's tokens, one in this many ends a response: lengths are geometric around it
LEAST_PROMPT, MOST_PROMPT = 4, 64  # tokens of a prompt: short ones and long ones in each batch
BAR = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # nats by which a log-probability as drawn may be off


@dataclass(frozen=True)
class Task:
    """What both samplers are given."""

    roles: Roles
    prompts: tuple[tuple[int, ...], ...]
    ends: frozenset[int]
    pad: int
    sampling: Sampling
    batch_size: int


@dataclass(frozen=True)
class Row:
    """One sampler: for each round its seconds and response tokens, and the spread of tokens per second."""

    sampler: str
    role: str  # ours | peer
    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    rate: measure.Spread


@dataclass(frozen=True)
class Report:
    benchmark: str
    device: str
    machine: str
    folder: str
    model: str
    parameters: int
    dtype: str
    prompts: int
    batch_size: int
    max_new_tokens: int
    temperature: float
    mean_response: float  # tokens
    error_logprobs: float  # nats, the largest: as drawn, against a pass over the finished sequences
    clock: str  # what a second is: of the wall, or of one processor
    repeats: int
    date: str
    commit: str
    dirty: bool
    load: float
    versions: dict[str, str]
    rows: tuple[Row, ...]
    ratio: measure.Spread  # tokens per second of ours over the peer's, round by round
    schema: int = records.SCHEMA


def random_task(count: int, sampling: Sampling, batch_size: int, device: torch.device, dtype: torch.dtype) -> Task:
    """A Llama of random weights and random prompts: nothing to download."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=MOST_PROMPT + sampling.max_new_tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)
    roles = Roles(model, ("policy",), {"policy": None}, "packed").eval()
    ends = frozenset(range(0, config.vocab_size, ENDING_SHARE))
    prompts = [torch.randint(1, config.vocab_size, (length,)).tolist() for length in lengths(count)]
    return Task(roles, tuple(map(tuple, prompts)), ends, 0, sampling, batch_size)


def model_task(model: str, file: str, count: int, sampling: Sampling, batch_size: int) -> Task:
    """A pretrained model, and prompts that are the first words of a file's texts."""
    settings = ModelConfig(model=model)
    tokenizer, roles = load_tokenizer(settings), load_player(settings, role="policy")
    rows = load_rows(file, split="train")
    column = next((name for name in ("prompt", "text") if name in rows[0].values), None)
    if column is None:
        raise click.UsageError(f"--prompts: {file} has neither a `prompt` nor a `text` column.")
    texts = [tokenizer.encode(rows[index % len(rows)].values[column])[:MOST_PROMPT] for index in range(count)]
    prompts = tuple(tuple(text[:length]) for text, length in zip(texts, lengths(count), strict=True))
    ends = end_tokens(roles, tokenizer)
    return Task(roles, prompts, ends, tokenizer.pad_token_id, sampling, batch_size)


def lengths(count: int) -> list[int]:
    """Prompt lengths, spread evenly and in no order."""
    span = MOST_PROMPT - LEAST_PROMPT + 1
    return [LEAST_PROMPT + index * 37 % span for index in range(count)]  # 37 shares no factor with the span of 61


def ours(task: Task) -> int:
    """Response tokens of our sampler."""
    return sum(len(response.tokens) for response in sampled(task).responses)


def sampled(task: Task) -> Any:
    return sample_responses(
        task.roles, task.prompts, task.sampling, ends=task.ends, pad=task.pad, batch_size=task.batch_size
    )


def peer(task: Task) -> int:
    """Response tokens of transformers' `generate`."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, temperature=task.sampling.temperature, top_k=0, top_p=1.0, pad_token_id=task.pad,
        max_new_tokens=task.sampling.max_new_tokens, eos_token_id=sorted(task.ends),
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


def ended_length(tokens: Sequence[int], ends: Collection[int]) -> int:
    """Tokens up to and with the first that ends."""
    return next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))


@torch.no_grad()
def error_of_ours(task: Task) -> float:
    """The largest difference between a log-probability as drawn and the same of one pass over the finished sequence."""
    torch.manual_seed(0)
    responses = sampled(task).responses
    worst = 0.0
    for prompt, response in zip(task.prompts, responses, strict=True):
        mask = (False,) * len(prompt) + (True,) * len(response.tokens)
        batch = pack([TokenSequence(prompt + response.tokens, mask)])
        targets = to_device(batch.targets, task.roles.device)
        batch = to_device(batch, task.roles.device)
        own = task.roles.logprobs(batch, targets, temperature=task.sampling.temperature)
        worst = max(worst, (own.cpu() - response.logprobs).abs().max().item())
    return worst


def take_turns(
    task: Task, device: torch.device, repeats: int, *, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> tuple[Row, Row]:
    """Both samplers, timed in turns on the same seeds."""
    counted: dict[str, list[int]] = {OURS: [], PEER: []}

    def work(name: str, sampler: Any) -> measure.Work:
        def run() -> None:
            torch.manual_seed(len(counted[name]))
            counted[name].append(sampler(task))

        return run

    works = {name: [work(name, sampler)] for name, sampler in ((OURS, ours), (PEER, peer))}
    times = measure.interleave(works, measure.stopwatch(device, clock), repeats=repeats, warmup=warmup)

    def row(name: str, role: str) -> Row:
        tokens = tuple(counted[name][-repeats:])
        rates = [count / seconds for count, seconds in zip(tokens, times[name], strict=True)]
        return Row(name, role, tuple(times[name]), tokens, measure.spread(rates))

    return row(OURS, "ours"), row(PEER, "peer")


def ratio_of(first: Row, second: Row) -> measure.Spread:
    """Tokens per second of one over the other's, round by round: what slowed a round falls on both."""
    rates = [[count / taken for count, taken in zip(row.tokens, row.seconds, strict=True)] for row in (first, second)]
    return measure.spread([one / other for one, other in zip(*rates, strict=True)])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", default="", help="Hugging Face name or folder. Default: a small Llama of random weights.")
@click.option("--prompts", default="", help="File whose `prompt` or `text` column begins the prompts of --model.")
@options.DEVICE
@click.option("--num-prompts", type=click.IntRange(1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True, help="Timed rollouts of each sampler.")
@options.BUSY
@options.out_option("the JSON")
def command(
    model: str,
    prompts: str,
    device: str,
    num_prompts: int,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    repeats: int,
    busy: bool,
    out: Path | None,
) -> None:
    """Time onecard's sampler against transformers' generate, in response tokens per second.

    Before anything is timed, the log-probabilities that ours keeps are compared with a pass over the finished
    sequences. If they are off, nothing is timed, nothing is written, and the exit status is 1.
    """
    if bool(model) != bool(prompts):
        raise click.UsageError("--model and --prompts: give both, or none for random weights and prompts.")
    where = ready_device(device)
    clock, clock_name = options.pick_clock(device, busy=busy)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sampling = Sampling(max_new_tokens, temperature)
    try:
        task = (
            model_task(model, prompts, num_prompts, sampling, batch_size)
            if model
            else random_task(num_prompts, sampling, batch_size, where, dtype)
        )
    except OnecardError as error:
        raise click.UsageError(str(error)) from None
    line, folder = records.machine(where)
    head, dirty = records.commit()
    load, date = os.getloadavg()[0], records.now()
    click.echo(f"{line}; {torch.__version__}; commit {head[:12]}{' (dirty)' if dirty else ''}")
    causal = task.roles.causal_model()
    error = error_of_ours(task)
    if not error <= BAR.get(causal.dtype, 0.5):
        raise Refused(f"log-probabilities as drawn are off by {error:.3g} nat")
    rows = take_turns(task, task.roles.device, repeats, clock=clock)
    report = Report(
        benchmark=BENCHMARK,
        device=device,
        machine=line,
        folder=folder,
        model=Path(model).name if model else RANDOM,
        parameters=sum(parameter.numel() for parameter in causal.parameters()),
        dtype=str(causal.dtype).removeprefix("torch."),
        prompts=num_prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        mean_response=sum(rows[0].tokens) / repeats / num_prompts,
        error_logprobs=error,
        clock=clock_name,
        repeats=repeats,
        date=date,
        commit=head,
        dirty=dirty or records.commit() != (head, dirty),
        load=load,
        versions=records.versions(),
        rows=rows,
        ratio=ratio_of(*rows),
    )
    for row in rows:
        click.echo(f"{row.sampler:24} {row.rate.median:10,.0f} tokens/s ({row.rate.q1:,.0f} .. {row.rate.q3:,.0f})")
    ratio = report.ratio
    click.echo(f"{'ratio':24} {ratio.median:10.2f} ({ratio.q1:.2f} .. {ratio.q3:.2f})")
    path = save(report, out or records.ROOT / "benchmarks" / "results" / folder)
    click.echo(f"wrote {path}")


def save(report: Report, folder: Path) -> Path:
    """Named as the kernels' results are."""
    model = records.slug(report.model)
    path = folder / records.stamped(report.benchmark, report.date, report.commit, model, dirty=report.dirty)
    records.save(report, path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Errors are one line: of use, status 2; a refusal, status 1."""
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
