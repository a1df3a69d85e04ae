"""`python -m benchmarks.kernels`: times the kernel library against its peers, writes one JSON file. See README.md."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import click
import torch
from rich.console import Console

from benchmarks import cli, harness, render
from benchmarks.cli import Refused
from benchmarks.harness import Benchmark, Timing, measure_case
from benchmarks.measure import free_memory
from benchmarks.records import Case, Recorder
from benchmarks.shapes import Shape
from benchmarks.suite import BENCHMARKS

REPEATS = {"cpu": 7, "cuda": 30}
BUDGET = {"cpu": 20.0, "cuda": 3.0}  # seconds of timed rounds a case, so that a run ends: 15 and 8 minutes
QUICK_REPEATS, QUICK_BUDGET = 5, 1.0
WARMUP = {"cpu": 0, "cuda": 3}  # on top of the check and the memory pass, which run every candidate in full
MODES = list(dict.fromkeys(mode for benchmark in BENCHMARKS.values() for mode in benchmark.modes))


Part = tuple[Benchmark, tuple[Shape, ...], tuple[str, ...]]  # what a run takes of one operation: shapes and modes


def parts_of(
    device: str, names: Sequence[str], shapes: Sequence[str], modes: Sequence[str], *, quick: bool, every: bool
) -> list[Part]:
    """Operations that have any of the shapes and modes asked for."""
    parts, known = list[Part](), dict[str, None]()
    for benchmark in (benchmark for name, benchmark in BENCHMARKS.items() if not names or name in names):
        # A shape that is named need not be among the usual ones.
        table = benchmark.shapes[device].of(quick=quick, every=every or bool(shapes))
        known |= dict.fromkeys(shape.name for shape in table)
        chosen = tuple(shape for shape in table if not shapes or shape.name in shapes)
        wanted = tuple(mode for mode in benchmark.modes if not modes or mode in modes)
        if chosen and wanted:
            parts.append((benchmark, chosen, wanted))
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise click.UsageError(f"--shape {unknown[0]}: not among the shapes of {device}: {', '.join(known)}.")
    if not parts:
        raise click.UsageError("--benchmark, --shape and --mode: no benchmark has them all.")
    return parts


def blank(benchmark: Benchmark, shape: Shape, mode: str, device: torch.device) -> Case:
    dtype = str(benchmark.dtypes[device.type]).removeprefix("torch.")
    about = {"operation": benchmark.about, "mode": benchmark.modes[mode].about}
    return Case(benchmark.name, shape.name, dict(shape.sizes), dtype, mode, about=about)


def measure(
    part: Part, recorder: Recorder, timing: Timing, device: torch.device, console: Console, *, quick: bool, every: bool
) -> None:
    """All cases of an operation. Once ours is wrong nothing of it stays."""
    benchmark, shapes, modes = part
    chosen = [c for c in benchmark.candidates if not (quick and c.slow_start)]
    wanted = {name for mode in modes for name in benchmark.modes[mode].results}
    before = recorder.report.cases
    with console.status("") as status:
        for shape in shapes:
            status.update(f"{benchmark.name} {shape}  inputs and fp64 oracle")
            sets = harness.input_sets(benchmark, shape, device)
            expected = benchmark.expected(sets[0], wanted)
            main = every or shape == shapes[0]
            for mode in modes:

                def tick(name: str, label: str = f"{benchmark.name} {shape} {mode}") -> None:
                    status.update(f"{label}  {name}")

                case = blank(benchmark, shape, mode, device)
                try:
                    rows = measure_case(benchmark, shape, mode, sets, expected, chosen, timing, main=main, tick=tick)
                except Refused as error:
                    recorder.put((*before, replace(case, refused=str(error))))
                    raise
                render.show(recorder, replace(case, rows=rows), console)
                free_memory()
            del sets, expected


@click.command(context_settings=cli.SETTINGS)
@click.option("--quick", is_flag=True, help="Small shapes, few calls, no torch.compile: shows that everything runs.")
@click.option("--benchmark", "names", multiple=True, type=click.Choice(list(BENCHMARKS)), help="Only this operation.")
@click.option("--shape", "shapes", multiple=True, help="Only this shape, by its name in benchmarks/shapes.py.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Only this mode.")
@click.option("--all-shapes", "every", is_flag=True, help="Every shape, and torch.compile at every shape. Hours.")
@cli.options("repeats", "busy")
def command(
    options: cli.Options, quick: bool, names: tuple[str, ...], shapes: tuple[str, ...], modes: tuple[str, ...],
    every: bool,
) -> None:  # fmt: skip
    """Time the kernel library against eager PyTorch, torch.compile, TRL, Liger and cut-cross-entropy.

    Every candidate gets the same tensors in the same process, is first compared with fp64, and is then timed in turns
    with the others and with bare matrix products and a copy, the limits. An operation in which ours is wrong is not
    timed; the others are, and the exit status is 1. The file is written after every case.

    \b
    python -m benchmarks.kernels --quick --out /tmp/bench     a minute: does it run?
    python -m benchmarks.kernels                              the CPU tables (about a quarter of an hour)
    python -m benchmarks.kernels --device cuda                the GPU tables (about eight minutes on an H200)
    python -m benchmarks.kernels --device cuda --benchmark linear_logprobs --shape llama3-8b-8k --mode frozen
    """
    device = options.device.type
    parts = parts_of(device, names, shapes, modes, quick=quick, every=every)
    repeats = options.repeats or (QUICK_REPEATS if quick else REPEATS[device])
    budget = math.inf if options.repeats else QUICK_BUDGET if quick else BUDGET[device]
    timing = Timing(repeats, WARMUP[device], budget, options.clock)
    recorder, console = options.recorder("kernels", repeats, quick=quick), Console()
    console.print(recorder.opening(), highlight=False)
    refused = []
    for part in parts:
        try:
            measure(part, recorder, timing, options.device, console, quick=quick, every=every)
        except Refused as error:
            refused.append(str(error))
    render.finish(recorder, data_only=options.data_only)
    if refused:
        raise Refused(" ".join(refused))


if __name__ == "__main__":
    sys.exit(cli.main(command))
