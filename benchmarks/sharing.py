"""`python -m benchmarks.sharing`: a DPO step whose prompts are laid once, against two copies of each. Writes JSON.

Same model, same pairs, same loss (reference and policy forward, policy backward; no optimizer), in turns. The gradients
are compared before anything is timed. A rate counts the tokens of the pairs as they come, both answers with the prompt,
so that both ways have the same number of them.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import torch

from benchmarks import measure, options, records
from benchmarks.cases import Refused
from benchmarks.kernels import main as guarded
from benchmarks.kernels import ready_device
from onecard.algorithms.dpo import make_recipe
from onecard.config import DPOConfig
from onecard.data.batches import PreferencePair, TokenSequence, answers
from onecard.models.build import load_roles
from onecard.models.micro_batching import MicroBatchSize
from onecard.models.roles import Roles
from onecard.training.trainer import Objective, accumulate

BENCHMARK = "sharing"
SHARED, APART = "shared prompts", "apart"
SHAPES = {"cpu": ("256/128", "64/64", "16/48"), "cuda": ("1024/256", "256/256", "64/256", "16/256")}
QUICK_SHAPES = ("32/16", "8/16")
TOKENS = {"cpu": 3072, "cuda": 32768}  # of the pairs of a step, laid apart
QUICK_TOKENS = 256
REPEATS = {"cpu": 15, "cuda": 20}
QUICK_REPEATS = 3
BAR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # how far the gradients may be from each other, relative, in norm
MODELS = {
    "cpu": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "cuda": {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way to lay the prompts: rows of the model in a step, seconds of each round, and their rate and memory."""

    name: str
    rows: int
    seconds: tuple[float, ...]
    rate: measure.Spread  # tokens of the pairs per second
    peak_bytes: int  # above what was allocated before the step


@dataclass(frozen=True)
class Case:
    """Pairs of one length. The ratios are shared over apart: of the rate, round by round, and of the peak."""

    prompt: int
    response: int
    pairs: int
    tokens: int
    error: float  # of the gradient, relative, in norm
    rows: tuple[Row, Row]
    speedup: measure.Spread
    memory: float


@dataclass(frozen=True)
class Report:
    benchmark: str
    device: str
    machine: str
    folder: str
    quick: bool
    parameters: int
    dtype: str
    clock: str
    repeats: int
    date: str
    commit: str
    dirty: bool
    load: float
    versions: dict[str, str]
    cases: tuple[Case, ...]
    schema: int = records.SCHEMA


def random_roles(device: str) -> Roles:
    """Policy and reference as `onecard dpo` loads them: a LoRA adapter on a Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        LlamaForCausalLM(LlamaConfig(**MODELS[device], max_position_embeddings=4096)).to(dtype).save_pretrained(folder)
        roles = load_roles(DPOConfig(model=folder), trained="policy", reference=True)
    with torch.no_grad():  # away from the reference, where the gradient would be the same for all pairs
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return roles.train()


def draw_pairs(prompt: int, response: int, tokens: int) -> list[PreferencePair]:
    """As many pairs as have so many tokens together, two at least."""
    generator = torch.Generator().manual_seed(prompt * 4099 + response)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 2048, (length,), generator=generator).tolist())

    def pair() -> PreferencePair:
        question, mask = draw(prompt), (False,) * prompt + (True,) * response
        return PreferencePair(*(TokenSequence(question + draw(response), mask) for _ in range(2)))

    return [pair() for _ in range(max(2, tokens // (2 * (prompt + response))))]


@contextmanager
def every_prompt_shared() -> Iterator[None]:
    """Inside, short prompts are shared too: where that stops to pay is what is measured."""
    with mock.patch.object(answers, "LEAST_SHARED", 1):
        yield


class Step:
    """The gradient of a step's pairs, with prompts shared or not."""

    def __init__(self, roles: Roles, pairs: Sequence[PreferencePair], *, share: bool) -> None:
        self.roles, self.pairs = roles, pairs
        self.objective: Objective[PreferencePair, object] = make_recipe(DPOConfig(share_prompts=share)).objective(roles)

    def ready(self) -> None:
        self.roles.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        accumulate(self.objective, self.pairs, MicroBatchSize(len(self.pairs)), self.roles.device)

    def gradient(self) -> torch.Tensor:
        self.ready()
        self()
        return torch.cat([parameter.grad.flatten() for parameter in self.roles.trained_parameters().values()])

    def num_rows(self) -> int:
        return sum(self.objective.size(pair) for pair in self.pairs)


def measure_case(
    roles: Roles, lengths: tuple[int, int], tokens: int, repeats: int, clock: Callable[[], float], where: torch.device
) -> Case:
    """One shape: compared, then its memory, then timed in turns."""
    pairs = draw_pairs(*lengths, tokens)
    steps = {SHARED: Step(roles, pairs, share=True), APART: Step(roles, pairs, share=False)}
    shared, apart = (step.gradient() for step in steps.values())
    error = float((shared - apart).norm() / apart.norm())
    if not error <= BAR[roles.causal_model().dtype]:
        raise Refused(f"prompt/response {lengths[0]}/{lengths[1]}: gradients are off by {error:.3g} of their norm")
    peaks = {name: measure.peak_bytes(step, where) for name, step in steps.items()}
    works: dict[str, list[measure.Work]] = {name: [step] for name, step in steps.items()}
    times = measure.interleave(works, measure.stopwatch(where, clock), repeats=repeats, warmup=1)
    count = sum(map(len, pairs))

    def row(name: str) -> Row:
        rates = measure.spread([count / taken for taken in times[name]])
        return Row(name, steps[name].num_rows(), tuple(times[name]), rates, peaks[name])

    ratios = [slow / fast for fast, slow in zip(times[SHARED], times[APART], strict=True)]
    return Case(
        *lengths, len(pairs), count, error, (row(SHARED), row(APART)),
        measure.spread(ratios), peaks[SHARED] / peaks[APART],
    )  # fmt: skip


def lengths_of(shape: str) -> tuple[int, int]:
    """ "256/128" -> 256 tokens of prompt, 128 of each answer."""
    found = re.fullmatch(r"(\d+)/(\d+)", shape)
    if not found or not int(found.group(1)) or not int(found.group(2)):
        raise click.UsageError(f"--shape {shape}: expected tokens of prompt and answer, such as 256/128.")
    return int(found.group(1)), int(found.group(2))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options.DEVICE
@click.option("--shape", "shapes", multiple=True, help="Tokens of prompt/answer; several times. Default: the device's.")
@click.option("--tokens", type=click.IntRange(1), help="Of a step's pairs, laid apart. Default: the device's.")
@click.option("--repeats", type=click.IntRange(1), help="Timed steps of each way. Default: the device's.")
@click.option("--quick", is_flag=True, help="Tiny shapes: does it run here?")
@options.BUSY
@options.out_option("the JSON")
def command(
    device: str,
    shapes: tuple[str, ...],
    tokens: int | None,
    repeats: int | None,
    quick: bool,
    busy: bool,
    out: Path | None,
) -> None:
    """Time and memory of a DPO step with each prompt laid once for both answers, against two copies of it.

    Before anything is timed, the gradients of both are compared. If they differ by more than rounding, nothing is
    written, and the exit status is 1.
    """
    where = ready_device(device)
    clock, clock_name = options.pick_clock(device, busy=busy)
    wanted = [lengths_of(shape) for shape in shapes or (QUICK_SHAPES if quick else SHAPES[device])]
    rounds = repeats or (QUICK_REPEATS if quick else REPEATS[device])
    count = tokens or (QUICK_TOKENS if quick else TOKENS[device])
    about = records.header(where)
    click.echo(records.opening(about))
    roles = random_roles(device)
    cases = []
    with every_prompt_shared():
        for lengths in wanted:
            cases.append(measure_case(roles, lengths, count, rounds, clock, where))
            click.echo(line_of(cases[-1]))
    causal = roles.causal_model()
    report = Report(
        **{**about, "dirty": records.is_dirty(about["commit"], dirty=about["dirty"])},
        benchmark=BENCHMARK,
        quick=quick,
        parameters=sum(parameter.numel() for parameter in causal.parameters()),
        dtype=str(causal.dtype).removeprefix("torch."),
        clock=clock_name,
        repeats=rounds,
        cases=tuple(cases),
    )
    path = save(report, out or records.ROOT / "benchmarks" / "results" / report.folder)
    click.echo(f"wrote {path}")


def line_of(case: Case) -> str:
    shared, apart = case.rows
    speed = case.speedup
    return (
        f"{case.pairs:4} pairs of {case.prompt}/{case.response}: rows {shared.rows} instead of {apart.rows}, "
        f"{shared.rate.median:,.0f} tokens/s instead of {apart.rate.median:,.0f}: {speed.median:.2f}x "
        f"({speed.q1:.2f} .. {speed.q3:.2f}), memory {case.memory:.2f}x"
    )


def save(report: Report, folder: Path) -> Path:
    """Named as the kernels' results are."""
    path = folder / records.stamped(
        report.benchmark, report.date, report.commit, dirty=report.dirty, quick=report.quick
    )
    records.save(report, path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Errors are one line: of use, status 2; a refusal, status 1."""
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
