"""`python -m benchmarks.tune`: turns every knob of the kernels, and proposes what measurement prefers. Writes JSON."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks import measure, options, records
from benchmarks.candidates import one_line
from benchmarks.cases import Refused, Timing, free
from benchmarks.kernels import Run, case_table, ready_device
from benchmarks.kernels import main as guarded
from benchmarks.records import Result
from benchmarks.shapes import Shape
from benchmarks.tune import knobs, render, sweep, turning
from benchmarks.tune.knobs import DRY, KNOBS, Knob
from benchmarks.tune.render import Report

REPEATS = {"cpu": 5, "cuda": 30}
BUDGET = {"cpu": 60.0, "cuda": 5.0}  # seconds of a case's timed rounds
WARMUP = {"cpu": 0, "cuda": 2}
DRY_TIMING = Timing(1)


def begun(knob: Knob, device: str) -> Result:
    benchmark = knob.benchmark
    dtype = str(benchmark.dtypes[device]).removeprefix("torch.")
    modes = {knob.mode: benchmark.modes[knob.mode].about}
    return Result(knob.name, f"{benchmark.name}: {knob.about}", benchmark.axes, dtype, modes, ())


class Sweep:
    """All cases in their order; none is begun once it is late."""

    def __init__(self, run: Run, device: torch.device, late: Callable[[], bool], *, dry: bool) -> None:
        self.run, self.device, self.late, self.dry = run, device, late, dry
        self.left_out: list[str] = []
        self.refused: list[str] = []

    def knob(self, knob: Knob) -> None:
        result = begun(knob, self.device.type)
        for shape in knob.shapes[DRY if self.dry else self.device.type]:
            if self.late():
                self.left_out.append(f"{knob.name} at {shape}")
                continue
            result = self.case(knob, shape, result)
            self.run.put(result)
            self.run.save()
            free(self.device)
            if result.refused is not None:
                break

    def case(self, knob: Knob, shape: Shape, result: Result) -> Result:
        settings = knobs.settings_of(knob, self.device.type, dry=self.dry)
        try:
            rows = sweep.measure_case(knob, shape, settings, self.device, self.run.timing, late=self.late)
        except Exception as error:  # the other knobs go on
            reason = str(error) if isinstance(error, Refused) else one_line(error)
            self.refused.append(f"{knob.name} at {shape}: {reason}")
            return replace(result, refused=reason)
        result = replace(result, rows=(*result.rows, *rows))
        self.run.console.print(case_table(result, rows))
        return result


def report_of(device: torch.device, clock: str, repeats: int, *, dry: bool) -> Report:
    return Report(**records.header(device), quick=dry, complete=False, clock=clock, repeats=repeats, results=())


def interpreted() -> str | None:
    """Have Triton's kernels run on CPU tensors, which is to be said before triton is imported; why not, if not."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    missing: str | None = turning.library("launch").why_not(torch.device("cpu"))
    return missing


@contextmanager
def few_collected() -> Iterator[None]:
    """What was imported is garbage to nobody: before each memory pass the collector would look through all of it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def rehearsal() -> Iterator[None]:
    """A GPU's code on small tensors: a small copy will do, too."""
    with turning.as_on_a_gpu(), turning.swapped(measure, "COPY_BYTES", 1 << 20):
        yield


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options.DEVICE
@click.option(
    "--dry", is_flag=True, help="A GPU's knobs at tiny sizes on CPU: shows that all of them run, and measures nothing."
)
@click.option("--knob", "names", multiple=True, type=click.Choice(list(KNOBS)), help="Only this knob (repeatable).")
@click.option(
    "--minutes", type=click.FloatRange(min=0), help="No knob, shape or setting is begun later than that. Default: all."
)
@options.BUSY
@options.out_option("the JSON and the Markdown")
@click.option("--data-only", is_flag=True, help="Write the JSON alone; benchmarks.tune.render makes the rest later.")
def command(
    device: str, dry: bool, names: tuple[str, ...], minutes: float | None, busy: bool, out: Path | None, data_only: bool
) -> None:
    """Turn each knob of the kernels: chunks, tiles, blocks, warps, stages, and the implementation for each mode.

    The default is first compared with fp64, each setting with fp64 and the default; what is wrong is not timed. Then
    all are timed in turns with each other and the limits. The file is written after every case; at its end stands what
    to change: only what is faster beyond the spread.

    \b
    python -m benchmarks.tune --dry --out /tmp/tune                    every knob of a GPU on CPU, in seconds
    python -m benchmarks.tune --device cuda --minutes 8                as many knobs as eight minutes allow
    python -m benchmarks.tune --device cuda --knob hopper-tile
    python -m benchmarks.tune --device cpu                             the CPU's own knobs
    """
    started = time.monotonic()
    if dry and device == "cuda":
        raise click.UsageError("--dry runs a GPU's knobs on CPU; leave out --device cuda.")
    if dry and (missing := interpreted()) is not None:
        click.echo(f"without Triton's kernels: {missing}")
    where = ready_device(device)
    todo = [knob for knob in knobs.of_device(device, dry=dry) if not names or knob.name in names]
    if not todo:
        raise click.UsageError(f"--knob {names[0]}: not a knob of {device}; benchmarks/tune/knobs.py lists them.")
    clock, clock_name = options.pick_clock(device, busy=busy)
    timing = DRY_TIMING if dry else Timing(REPEATS[device], WARMUP[device], BUDGET[device], clock)
    report = report_of(where, clock_name, timing.repeats, dry=dry)
    name = records.stamped(render.KIND, report.date, report.commit, dirty=report.dirty, quick=dry)
    console = Console(width=None if sys.stdout.isatty() else 120)
    run = Run(report, (out or records.ROOT / "benchmarks" / "results" / report.folder) / name, timing, console, ())
    made = Sweep(run, where, lambda: minutes is not None and time.monotonic() - started > 60 * minutes, dry=dry)
    with few_collected(), rehearsal() if dry else nullcontext():
        for knob in todo:
            made.knob(knob)
    assert isinstance(run.report, Report)
    run.report = replace(run.report, left_out=tuple(made.left_out))
    run.save(complete=not made.left_out)
    if run.path.exists():
        report = render.load(run.path)
        console.print(render.summary(report, run.path.name), highlight=False, soft_wrap=True, markup=False)
        for path in (run.path, *([] if data_only else render.render_file(run.path))):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    elif made.left_out:
        console.print("nothing was begun: the time was over")
    if made.refused:
        raise Refused("; ".join(made.refused))


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
