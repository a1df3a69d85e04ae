"""`python -m benchmarks.kernels`: times the kernel library against its peers, writes one JSON file. See README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import click
import torch

from benchmarks import cli, harness, render
from benchmarks.cli import Refused
from benchmarks.harness import Benchmark, Candidate, one_line
from benchmarks.measure import Timing, free_memory
from benchmarks.records import Case
from benchmarks.shapes import Shape
from benchmarks.suite import BENCHMARKS

# A case's check and memory pass run every candidate in full before the warm-up. The budgets end a run after about 15
# minutes on a CPU and 8 on a GPU.
TIMING = {"cpu": Timing(7, budget=20.0), "cuda": Timing(30, warmup=3, budget=3.0)}
QUICK = Timing(5, budget=1.0)
MODES = list(dict.fromkeys(mode for benchmark in BENCHMARKS.values() for mode in benchmark.modes))


def select_cases(
    device: str, names: Sequence[str], shapes: Sequence[str], modes: Sequence[str], *, quick: bool, every: bool
) -> list[tuple[Benchmark, Shape, str, bool]]:
    """Operation, shape, mode, and whether candidates that compile for long are timed: at the first shape alone."""
    cases, known = [], dict[str, None]()
    for benchmark in (benchmark for name, benchmark in BENCHMARKS.items() if not names or name in names):
        # A shape that is named need not be among the usual ones.
        table = benchmark.shapes[device].of(quick=quick, every=every or bool(shapes))
        known |= dict.fromkeys(shape.name for shape in table)
        chosen = [shape for shape in table if not shapes or shape.name in shapes]
        wanted = [mode for mode in benchmark.modes if not modes or mode in modes]
        cases += [(benchmark, shape, mode, every or shape == chosen[0]) for shape in chosen for mode in wanted]
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise click.UsageError(f"--shape {unknown[0]}: not among the shapes of {device}: {', '.join(known)}.")
    if not cases:
        raise click.UsageError("--benchmark, --shape and --mode: no benchmark has them all.")
    return cases


def measure_case(
    benchmark: Benchmark,
    shape: Shape,
    mode: str,
    candidates: Sequence[Candidate],
    device: torch.device,
    timing: Timing,
    tell: Callable[[str], None],
    *,
    main: bool = True,
) -> Case:
    """Inputs, fp64 oracle, checks, memory and times of a case; the reason where ours is wrong or does not run."""
    dtype = str(benchmark.dtypes[device.type]).removeprefix("torch.")
    about = {"operation": benchmark.about, "mode": benchmark.modes[mode].about}
    case = Case(benchmark.name, shape.name, dict(shape.sizes), dtype, mode, about=about)

    def tick(name: str) -> None:
        tell(f"{benchmark.name} {shape} {mode}  {name}")

    try:
        rows = harness.measure_case(benchmark, shape, mode, candidates, device, timing, main=main, tick=tick)
    except Exception as error:  # the other cases go on
        return replace(case, refused=str(error) if isinstance(error, Refused) else one_line(error))
    finally:
        free_memory()
    return replace(case, rows=rows)


@click.command(context_settings=cli.SETTINGS)
@click.option("--quick", is_flag=True, help="Small shapes, few calls, no torch.compile: shows that everything runs.")
@click.option("--benchmark", "names", multiple=True, type=click.Choice(list(BENCHMARKS)), help="Only this operation.")
@click.option("--shape", "shapes", multiple=True, help="Only this shape, by its name in benchmarks/shapes.py.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Only this mode.")
@click.option("--all-shapes", "every", is_flag=True, help="Every shape, and torch.compile at every shape. Hours.")
@cli.options("repeats", "busy")
def command(
    options: cli.Options,
    quick: bool,
    names: tuple[str, ...],
    shapes: tuple[str, ...],
    modes: tuple[str, ...],
    every: bool,
) -> None:
    """Time the kernel library against eager PyTorch, torch.compile, TRL, Liger and cut-cross-entropy.

    Every candidate gets the same tensors in the same process, is first compared with fp64, and is then timed in turns
    with the others and with bare matrix products and a copy, the limits. A case in which ours is wrong is not timed;
    the others are, and the exit status is 1. The file is written after every case.

    \b
    python -m benchmarks.kernels --quick --out /tmp/bench     a minute: does it run?
    python -m benchmarks.kernels                              the CPU tables (about a quarter of an hour)
    python -m benchmarks.kernels --device cuda                the GPU tables (about eight minutes on an H200)
    python -m benchmarks.kernels --device cuda --benchmark linear_logprobs --shape llama3-8b-8k --mode frozen
    """
    cases = select_cases(options.device.type, names, shapes, modes, quick=quick, every=every)
    timing = options.timing(QUICK if quick else TIMING[options.device.type])

    def measure(case: tuple[Benchmark, Shape, str, bool], tell: Callable[[str], None]) -> Case:
        benchmark, shape, mode, main = case
        candidates = [candidate for candidate in benchmark.candidates if not (quick and candidate.slow_start)]
        return measure_case(benchmark, shape, mode, candidates, options.device, timing, tell, main=main)

    render.run(options.recorder("kernels", timing.repeats, quick=quick), cases, measure)


if __name__ == "__main__":
    sys.exit(cli.main(command))
