"""`python -m benchmarks.kernels`: times the kernel library against its peers, writes one JSON file. See README.md."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import anatomy, options, records, render, tables, targets
from benchmarks.anatomy import OURS, Benchmark
from benchmarks.cases import Refused, Timing, free, measure_case
from benchmarks.records import LIMIT, Report, Result, Row
from benchmarks.shapes import Shape
from benchmarks.suite import BENCHMARKS

REPEATS = {"cpu": 7, "cuda": 30}
BUDGET = {"cpu": 20.0, "cuda": 3.0}  # seconds of timed rounds a case, so that a run ends: 15 and 8 minutes
QUICK_REPEATS, QUICK_BUDGET = 5, 1.0
WARMUP = {"cpu": 0, "cuda": 3}  # on top of the check and the memory pass, which run every work in full
STYLES = {"ours": "bold green", LIMIT: "dim"}
PEERS = sorted({c.name for benchmark in BENCHMARKS.values() for c in benchmark.candidates} - {OURS})
MODES = list(dict.fromkeys(mode for benchmark in BENCHMARKS.values() for mode in benchmark.modes))


@dataclass(frozen=True)
class Part:
    """What a run takes of one benchmark."""

    benchmark: Benchmark
    shapes: tuple[Shape, ...]
    modes: tuple[str, ...]


def case_table(result: Result, rows: Sequence[Row]) -> Table:
    ours, columns, first = tables.ours_of(rows), tables.columns_of(rows), rows[0]
    title = f"{result.benchmark}, {result.modes[first.mode]}\n{result.axes} = {tables.size(first)}"
    notes = [f"ratio: time over {OURS}'s; {', '.join(columns.errors)}: errors against fp64"]
    notes += [f"{row.candidate}: {row.reason}" for row in rows if row.reason is not None]
    notes += [tables.rate(row) for row in rows if row.role == LIMIT]
    table = Table(title=title, title_justify="left", caption="\n".join(notes), caption_justify="left", box=SIMPLE)
    for index, heading in enumerate(columns.brief_headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        if row.reason is None:
            table.add_row(*columns.brief(row, ours), style=STYLES.get(row.role))
    return table


def target_table(report: Report) -> Table | None:
    judged = targets.verdicts(report)
    if not judged:
        return None
    table = Table(title=targets.heading(report), title_justify="left", box=SIMPLE)
    for index, name in enumerate(targets.HEADINGS):
        table.add_column(name, justify="right" if index in (1, 2) else "left")
    for verdict in judged:
        table.add_row(*verdict.cells, style={True: "green", False: "red", None: "dim"}[verdict.met])
    return table


class Run:
    """A run under way. After every case the file has all that is finished, so that a run cut off leaves it."""

    def __init__(self, report: Report, path: Path, timing: Timing, console: Console, without: Sequence[str]) -> None:
        self.report, self.path, self.timing, self.console, self.without = report, path, timing, console, without

    def save(self, *, complete: bool = False) -> None:
        if not any(result.rows for result in self.report.results):
            self.path.unlink(missing_ok=True)  # all that there was has been refused
            return
        # The tree must not have changed under the run either
        dirty = records.is_dirty(self.report.commit, dirty=self.report.dirty)
        self.report = replace(self.report, complete=complete, dirty=dirty)
        records.save(self.report, self.path)

    def put(self, result: Result) -> None:
        """The newest state of a benchmark takes the place of its last one."""
        others = tuple(r for r in self.report.results if r.benchmark != result.benchmark)
        self.report = replace(self.report, results=(*others, result))

    def measure(self, part: Part, device: torch.device, *, quick: bool, every: bool, progress: Progress) -> None:
        """All cases of a benchmark. Once ours is wrong nothing of it stays."""
        benchmark, task = part.benchmark, progress.task_ids[0]
        result = Result(
            benchmark=benchmark.name,
            about=benchmark.about,
            axes=benchmark.axes,
            dtype=str(benchmark.dtypes[device.type]).removeprefix("torch."),
            modes={name: mode.about for name, mode in benchmark.modes.items() if name in part.modes},
            rows=(),
        )
        chosen = [c for c in benchmark.candidates if c.name not in self.without and not (quick and c.slow_start)]
        wanted = {name for mode in part.modes for name in benchmark.modes[mode].results}
        for shape in part.shapes:
            label = f"{benchmark.name} {shape}"
            progress.update(task, description=f"{label}  inputs and fp64 truth")
            sets = anatomy.input_sets(benchmark, shape, device)
            true = benchmark.truth(sets[0], wanted)
            main = every or shape == part.shapes[0]
            for mode in part.modes:

                def tick(name: str, label: str = f"{label} {mode}") -> None:
                    progress.update(task, description=f"{label}  {name}")

                rows = measure_case(benchmark, shape, mode, sets, true, chosen, self.timing, main=main, tick=tick)
                result = replace(result, rows=(*result.rows, *rows))
                self.put(result)
                self.save()
                self.console.print(case_table(result, rows))
                progress.advance(task)
                free(device)
            del sets, true
            free(device)

    def refuse(self, benchmark: Benchmark, reason: str) -> None:
        self.put(Result(benchmark.name, benchmark.about, benchmark.axes, "", {}, (), reason))
        self.save()


def ready_device(name: str) -> torch.device:
    if name == "cuda":
        if not torch.cuda.is_available():
            raise click.UsageError("--device cuda: PyTorch finds no GPU here; --device cpu runs anywhere.")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def parts_of(
    device: str, names: Sequence[str], shapes: Sequence[str], modes: Sequence[str], *, quick: bool, every: bool
) -> list[Part]:
    """What was asked for; benchmarks that have none of the shapes or modes are left out."""
    picked = [benchmark for name, benchmark in BENCHMARKS.items() if not names or name in names]
    # A shape that is named need not be among the usual ones
    tables_of = {b.name: b.shapes[device].of(quick=quick, every=every or bool(shapes)) for b in picked}
    known = list(dict.fromkeys(shape.name for table in tables_of.values() for shape in table))
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise click.UsageError(f"--shape {unknown[0]}: not among the shapes of {device}: {', '.join(known)}.")
    parts = []
    for benchmark in picked:
        chosen = tuple(shape for shape in tables_of[benchmark.name] if not shapes or shape.name in shapes)
        wanted = tuple(mode for mode in benchmark.modes if not modes or mode in modes)
        if chosen and wanted:
            parts.append(Part(benchmark, chosen, wanted))
    if not parts:
        raise click.UsageError("--benchmark, --shape and --mode: no benchmark has them all.")
    return parts


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="cpu: fp32; cuda: bf16."
)
@click.option("--quick", is_flag=True, help="Small shapes, few calls, no torch.compile: shows that everything runs.")
@click.option(
    "--benchmark", "names", multiple=True, type=click.Choice(list(BENCHMARKS)), help="Only this one (repeatable)."
)
@click.option(
    "--shape", "shapes", multiple=True, help="Only this shape, by name (repeatable); benchmarks/shapes.py lists them."
)
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Only this mode (repeatable).")
@click.option("--all-shapes", "every", is_flag=True, help="Every shape, and torch.compile at every shape. Hours.")
@click.option("--without", multiple=True, type=click.Choice(PEERS), help="Leave out a candidate (repeatable).")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    help="Timed calls of each candidate. Default: 7 on cpu and 30 on cuda, fewer where they take long.",
)
@options.BUSY
@options.out_option("the JSON, the Markdown and the plots")
@click.option("--data-only", is_flag=True, help="Write the JSON alone; benchmarks.render makes the rest of it later.")
def command(
    device: str,
    quick: bool,
    names: tuple[str, ...],
    shapes: tuple[str, ...],
    modes: tuple[str, ...],
    every: bool,
    without: tuple[str, ...],
    repeats: int | None,
    busy: bool,
    out: Path | None,
    data_only: bool,
) -> None:
    """Time the kernel library against eager PyTorch, torch.compile, TRL, Liger and cut-cross-entropy.

    Every candidate gets the same tensors in the same process, is first compared with fp64, and is then timed in turns
    with the others and with bare matrix products and a copy, the limits. A benchmark in which ours is wrong is not
    timed; the others are, and the exit status is 1. The file is written after every case.

    \b
    python -m benchmarks.kernels --quick --out /tmp/bench     a minute, to see it work
    python -m benchmarks.kernels                              the CPU tables (about a quarter of an hour)
    python -m benchmarks.kernels --device cuda                the GPU tables (about eight minutes on an H200)
    python -m benchmarks.kernels --device cuda --benchmark linear_logprobs --shape llama3-8b-8k --mode frozen
    """
    where = ready_device(device)
    parts = parts_of(device, names, shapes, modes, quick=quick, every=every)
    clock, clock_name = options.pick_clock(device, busy=busy)
    budget = math.inf if repeats else QUICK_BUDGET if quick else BUDGET[device]
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS[device])
    about = records.header(where)
    report = Report(**about, quick=quick, complete=False, clock=clock_name, repeats=repeats, results=())
    console = Console()
    console.print(records.opening(about), highlight=False)
    path = (out or records.ROOT / "benchmarks" / "results" / report.folder) / records.file_name(report)
    run = Run(report, path, Timing(repeats, WARMUP[device], budget, clock), console, without)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    refused = []
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("", total=sum(len(part.shapes) * len(part.modes) for part in parts))
        for part in parts:
            try:
                run.measure(part, where, quick=quick, every=every, progress=progress)
            except Refused as error:
                refused.append(str(error))
                run.refuse(part.benchmark, str(error))
    run.save(complete=True)
    if path.exists():
        verdicts = target_table(run.report)
        if verdicts is not None:
            console.print(verdicts)
        for made in (path, *([] if data_only else render.render(path))):
            console.print(f"wrote {made}", highlight=False, soft_wrap=True)
    if refused:
        raise Refused(" ".join(refused))


def main(arguments: Sequence[str] | None = None, entry: click.Command = command) -> int:
    """Errors are one line: of use, status 2; a refusal, status 1."""
    try:
        entry.main(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except Refused as error:
        click.echo(f"refused: {error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
