"""`python -m benchmarks.tune`: times settings of the kernels against their defaults, and proposes what is faster.

A knob varies one thing (rows of a chunk, a tile, blocks and warps, the implementation) for one public function in one
mode. Each setting is first compared with fp64, and not timed if it is wrong. A setting is proposed if it ran in all
cases, is faster in one and slower in none, beyond the quartiles of both, and keeps the promised workspace.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

import click
import torch

from benchmarks import cli, kernels, measure, records, render
from benchmarks.harness import EAGER, Benchmark
from benchmarks.measure import Timing
from benchmarks.records import OURS, Case, Report, Row
from benchmarks.shapes import CUDA_FEW, LINEAR, LOGITS, Shape, linear, logits
from benchmarks.suite import linear_kl, linear_logprobs, selective

TIMING = {"cpu": Timing(5, budget=60.0), "cuda": Timing(30, warmup=2, budget=5.0)}
CPU, CUDA = "cpu", "cuda"

Values = Mapping[str, Any]
Apply = Callable[[Values], AbstractContextManager[object]]


# --- applying a setting: a `with` in which numbers of the kernel library are replaced. The library is imported only
# there, for Triton's interpreter has to be chosen before triton is imported.


def library(module: str) -> Any:
    return import_module(f"onecard_kernels.{module}")


def plan(**always: Any) -> Apply:
    """The plan of the linear path. `always` holds for the default too."""
    return lambda values: library("logprob.tuning").override(**{**always, **values})


def constants(module: str) -> Apply:
    """Numbers of a module, by their names in small letters."""
    return lambda values: (
        mock.patch.multiple(library(module), **{name.upper(): value for name, value in values.items()})
        if values
        else nullcontext()
    )


def fields(module: str, name: str) -> Apply:
    """Fields of a named tuple of a module."""
    return lambda values: mock.patch.object(library(module), name, getattr(library(module), name)._replace(**values))


@contextmanager
def tile(values: Values) -> Iterator[None]:
    """Fields of the tile that the tiled forward takes from its table of cards."""
    module = library("logprob.triton_tiled")
    table = module.config_on
    with (
        plan(implementation="tiled")({}),
        mock.patch.object(module, "config_on", lambda *asked: replace(table(*asked), **values)),
    ):
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Run a GPU's plans on CPU tensors, and Triton's kernels if its interpreter is on."""
    preference, table = library("dispatch").PREFERENCE, library("logprob.tuning").TABLE
    with (
        mock.patch.dict(preference, cpu=preference["cuda"]),
        mock.patch.dict(table, cpu=table["cuda"]),
        mock.patch.object(measure, "COPY_BYTES", 1 << 20),
    ):
        yield


# --- the knobs, the most telling first


@dataclass(frozen=True)
class Knob:
    name: str
    benchmark: Benchmark
    mode: str
    apply: Apply  # a context in which the values hold
    where: str  # what to change in the library
    settings: Mapping[str, tuple[Values, ...]]  # by device
    shapes: Mapping[str, tuple[Shape, ...]]  # by device
    workspace: float | None = None  # bytes beyond the gradient of the hidden states; what takes more is not proposed


def label(values: Values) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def grid(**values: Sequence[Any]) -> tuple[Values, ...]:
    return tuple(dict(zip(values, point, strict=True)) for point in product(*values.values()))


FORWARD, FROZEN, TRAINED = linear_logprobs.FORWARD, linear_logprobs.FROZEN, linear_logprobs.TRAINED
LOGPROBS, KL, LOGITS_PASS = linear_logprobs.BENCHMARK, linear_kl.BENCHMARK, selective.BENCHMARK
FEW, ONE, WIDE, ON_CPU = CUDA_FEW, CUDA_FEW[:1], LOGITS[CUDA].usual, LINEAR[CPU].usual
FAST, LOW = 1e9, 1e8  # bytes of workspace that are promised
CHUNK_ROWS = {CUDA: grid(rows=(256, 512, 1024, 1536, 2048, 4096)), CPU: grid(rows=(64, 128, 256, 512, 1024))}
TILE_SIZES = {
    CUDA: grid(rows=(1024, 2048, 4096), columns=(2048, 4096, 8192)),
    CPU: grid(rows=(512, 1024, 2048), columns=(1024, 2048, 4096)),
}
# Bytes of a row that a thread has in flight, and warps; (64, 8) is the default.
MAX_BLOCKS = {
    CUDA: tuple(v for v in grid(thread_bytes=(32, 64, 128), warps=(4, 8, 16)) if tuple(v.values()) != (64, 8))
}
# None of these spills on sm_90 in bf16; `at_once` is what registers and shared memory leave room for.
TILES: tuple[Values, ...] = (
    {"stages": 3}, {"group": 8}, {"group": 32}, {"depth": 128, "stages": 2}, {"depth": 32},
    {"rows": 256, "columns": 128}, {"columns": 128}, {"columns": 128, "warps": 4, "stages": 3, "at_once": 2},
    {"rows": 64, "depth": 32, "warps": 4, "at_once": 2},
)  # fmt: skip
KL_BLOCKS = (
    *grid(block=(2048, 4096), warps=(4, 8)), *grid(block=(4096,), warps=(16,)), *grid(block=(8192,), warps=(8, 16))
)  # fmt: skip
BLOCK_BYTES = grid(block_bytes=tuple(n << 20 for n in (1, 2, 4, 8, 16)))
DEFAULT = "logprob.tuning: the default implementation, of all modes"
ROW_PASS, EXP_PASS = "logprob.triton_rows", "logprob.triton_exp"


def implementations(*names: str) -> dict[str, tuple[Values, ...]]:
    return {CUDA: grid(implementation=names), CPU: grid(implementation=("chunked",))}


KNOBS: dict[str, Knob] = {
    knob.name: knob
    for knob in (
        Knob("chunk-rows", LOGPROBS, FROZEN, plan(implementation="chunked"), "logprob.tuning: rows of a chunk",
             CHUNK_ROWS, {CUDA: FEW, CPU: ON_CPU}, FAST),
        Knob("implementation-forward", LOGPROBS, FORWARD, plan(), DEFAULT, implementations("low_memory", "tiled"),
             {CUDA: FEW, CPU: ON_CPU}),
        Knob("hopper-tile", LOGPROBS, FORWARD, tile, "logprob.tuning: the tile of compute capability 9.0",
             {CUDA: TILES}, {CUDA: ONE}),
        Knob("implementation-frozen", LOGPROBS, FROZEN, plan(), DEFAULT, implementations("low_memory"),
             {CUDA: FEW, CPU: ON_CPU}),
        Knob("low-memory-tiles", LOGPROBS, FROZEN, plan(implementation="low_memory"),
             "logprob.tuning: rows and columns of a tile", TILE_SIZES, {CUDA: ONE, CPU: ON_CPU}, LOW),
        Knob("logits-forward", LOGITS_PASS, selective.FORWARD, fields(ROW_PASS, "FORWARD"), f"{ROW_PASS}: FORWARD",
             MAX_BLOCKS, {CUDA: WIDE}),
        Knob("linear-pass", LOGPROBS, FROZEN, fields(EXP_PASS, "MAX_BLOCK"), f"{EXP_PASS}: MAX_BLOCK",
             MAX_BLOCKS, {CUDA: ONE}),
        Knob("logits-backward", LOGITS_PASS, selective.BACKWARD, fields(ROW_PASS, "BACKWARD"), f"{ROW_PASS}: BACKWARD",
             MAX_BLOCKS, {CUDA: WIDE[:1]}),
        Knob("implementation-trained", LOGPROBS, TRAINED, plan(), DEFAULT, implementations("low_memory"),
             {CUDA: ONE, CPU: ON_CPU}),
        Knob("kl-pass", KL, linear_kl.FROZEN, constants("kl.triton"), "kl.triton", {CUDA: KL_BLOCKS}, {CUDA: ONE}),
        Knob("cpu-blocks", LOGPROBS, FROZEN, constants("logprob.rows"), "logprob.rows", {CPU: BLOCK_BYTES},
             {CPU: ON_CPU[:1]}),
    )
}  # fmt: skip


def cases_of(knob: Knob, device: str, *, dry: bool) -> tuple[tuple[Shape, ...], tuple[Values, ...]]:
    """Shapes and settings. Dry: a tiny shape, the first and the last of the GPU's settings."""
    if not dry:
        return knob.shapes.get(device, ()), knob.settings.get(device, ())
    found = knob.settings.get(CUDA) or knob.settings[CPU]
    shape = logits("tiny", 2, 70) if knob.benchmark is LOGITS_PASS else linear("tiny", 2, 16, 70)
    return (shape,), (found[0], found[-1])[: len(found)]


def measure_case(
    knob: Knob,
    shape: Shape,
    settings: Sequence[Values],
    device: torch.device,
    timing: Timing,
    tell: Callable[[str], None],
) -> Case:
    """Eager, the default, each setting, and the limits."""
    eager, default = (next(c for c in knob.benchmark.candidates if c.name == name) for name in (EAGER, OURS))
    candidates = [eager, replace(default, around=lambda: knob.apply({}))]
    for values in settings:
        candidates.append(replace(default, name=label(values), role="setting", around=partial(knob.apply, values)))
    case = kernels.measure_case(knob.benchmark, shape, knob.mode, candidates, device, timing, tell)
    return replace(case, what=knob.name)


# --- proposing


def faster(row: Row, other: Row) -> bool:
    """Beyond the quartiles of both; a round or two have none."""
    one, two = row.time, other.time
    return one is not None and two is not None and min(one.count, two.count) >= measure.LEAST_ROUNDS and one.q3 < two.q1


def kept_small(knob: Knob, row: Row, case: Case) -> bool:
    """Whether the peak, without the gradient of the hidden states, is within the promised workspace."""
    returned = case.sizes["N"] * case.sizes["D"] * getattr(torch, case.dtype).itemsize if "dHidden" in row.errors else 0
    return knob.workspace is None or (row.peak_bytes or 0) - returned <= knob.workspace


def tried(case: Case) -> list[Row]:
    return [row for row in case.rows if row.role == "ours" and row.name != OURS and row.seconds]


def proposal(knob: Knob, cases: Sequence[Case]) -> tuple[float, str] | None:
    """The best setting that is faster in one case and slower in none: (mean time over the default's, setting)."""
    found = []
    for name in dict.fromkeys(row.name for case in cases for row in tried(case)):
        pairs = [(row, default, case) for case in cases if (row := case.row(name)) and (default := case.row(OURS))]
        if len(pairs) < len(cases) or not all(row.seconds for row, _, _ in pairs):
            continue  # a default has to run everywhere
        small = all(kept_small(knob, row, case) for row, _, case in pairs)
        slower = any(faster(default, row) for row, default, _ in pairs)
        if small and not slower and any(faster(row, default) for row, default, _ in pairs):
            logs = [math.log(times.median) for row, default, _ in pairs if (times := records.ratio(row, default))]
            found.append((math.exp(sum(logs) / len(logs)), name))
    return min(found, default=None)


HEADINGS = ("knob", "mode", "shape", "default, ms", "fastest setting", "its ms", "time / default", "verdict")


def proposals(report: Report) -> str:
    """The fastest setting of every case, and what to change."""
    lines, changes = [], []
    for name, all_cases in report.kinds.items():
        knob = KNOBS[name]
        cases = [case for case in all_cases if case.rows]
        for case in cases:
            default, settings = case.row(OURS), tried(case)
            if default is None or not settings:
                continue
            best = min(settings, key=lambda row: row.time.median if row.time else math.inf)
            times = records.ratio(best, default)
            verdict = "within the spread" if times and times.median < 1 else "the default is best"
            if faster(best, default):
                verdict = "faster" if kept_small(knob, best, case) else "faster, but over the promised workspace"
            medians = [render.milliseconds(row.time and row.time.median) for row in (default, best)]
            lines.append([name, case.mode, render.size(case), medians[0], best.name, medians[1], render.factor(times),
                          verdict])  # fmt: skip
        better = proposal(knob, cases)
        if better is not None:
            changes.append(f"- {knob.where}: {better[1]} ({better[0]:.3f} of the default's time, knob {name})")
    nothing = "No setting is faster than its default beyond the spread in one case and slower in none."
    return f"{render.table(HEADINGS, lines)}\n\n" + ("\n".join(changes) or nothing)


@click.command(context_settings=cli.SETTINGS)
@click.option("--dry", is_flag=True, help="A GPU's knobs at tiny sizes on CPU: shows that they run, measures nothing.")
@click.option("--knob", "names", multiple=True, type=click.Choice(list(KNOBS)), help="Only this knob.")
@cli.options("minutes", "busy")
def command(options: cli.Options, dry: bool, names: tuple[str, ...]) -> None:
    """Time settings of the kernels (chunks, tiles, blocks, warps, implementations) and propose what is faster.

    \b
    python -m benchmarks.tune --dry --out /tmp/tune          every knob of a GPU on CPU, in seconds
    python -m benchmarks.tune --device cuda --minutes 8      as many knobs as begin in eight minutes
    python -m benchmarks.tune --device cuda --knob hopper-tile
    python -m benchmarks.tune                                the CPU's own knobs
    """
    device = options.device.type
    if dry and device == CUDA:
        raise click.UsageError("--dry runs a GPU's knobs on CPU; leave out --device cuda.")
    if dry and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    todo = []
    for knob in KNOBS.values():
        shapes, settings = cases_of(knob, device, dry=dry)
        todo += [(knob, shape, settings) for shape in shapes if settings and (not names or knob.name in names)]
    if not todo:
        raise click.UsageError(f"--knob {', '.join(names)}: no knob of {device}.")
    timing = options.timing(Timing(1) if dry else TIMING[device])
    recorder = options.recorder("tune", timing.repeats, quick=dry)
    with as_on_a_gpu() if dry else nullcontext():
        render.run(
            recorder, todo, lambda each, tell: measure_case(*each, options.device, timing, tell), options.minutes
        )


if __name__ == "__main__":
    sys.exit(cli.main(command))
