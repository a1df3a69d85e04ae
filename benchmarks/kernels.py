"""`python -m benchmarks.kernels`: times the fused losses against their peers, writes one JSON file. See README.md."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import records, render, shapes, tables, truth
from benchmarks.candidates import CANDIDATES, OURS, Candidate
from benchmarks.cases import PASSES, Refused, measure_case
from benchmarks.records import LIMIT, Report, Row
from benchmarks.shapes import MODES, Shape

BENCHMARK = "linear_logprobs"
REPEATS = {"cpu": 7, "cuda": 30}
CLOCKS = {False: (time.perf_counter, "wall time"), True: (time.process_time, "processor time of one thread")}
WARMUP = {"cpu": 0, "cuda": 3}  # on top of the check and the memory pass, which run every work in full
QUICK_REPEATS = 5


def case_table(rows: Sequence[Row]) -> Table:
    ours, first = tables.ours_of(rows), rows[0]
    title = f"{MODES[first.mode]}\nN x D x V = {first.tokens} x {first.hidden} x {first.vocab}"
    notes = [f"{row.candidate}: {row.reason}" for row in rows if row.reason is not None]
    notes += [tables.rate(row) for row in rows if row.role == LIMIT]
    table = Table(title=title, title_justify="left", caption="\n".join(notes), caption_justify="left", box=SIMPLE)
    for index, heading in enumerate(tables.BRIEF_HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        if row.reason is None:
            table.add_row(*tables.brief(row, ours), style={"ours": "bold green", LIMIT: "dim"}.get(row.role))
    return table


def run_all(
    device: torch.device,
    picked: Sequence[Shape],
    modes: Sequence[str],
    chosen: Sequence[Candidate],
    repeats: int,
    clock: Callable[[], float],
    console: Console,
) -> list[Row]:
    dtype, warmup = shapes.DTYPES[device.type], max(WARMUP[device.type], 1)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        per_case = len(chosen) * (repeats + warmup + PASSES) + 2 * (repeats + warmup)  # 2: the limits
        task = progress.add_task("inputs", total=len(picked) * len(modes) * per_case)
        for shape in picked:
            progress.update(task, description=f"{shape}  inputs and fp64 truth")
            sets = shapes.input_sets(shape, device, dtype)
            true = truth.truth_of(sets[0], shapes.TRAINED if shapes.TRAINED in modes else shapes.FROZEN)
            for mode in modes:

                def tick(name: str, steps: int, label: str = f"{shape}  {mode}") -> None:
                    progress.update(task, advance=steps, description=f"{label}  {name}")

                found = measure_case(
                    shape, mode, sets, true, chosen, repeats=repeats, warmup=warmup, clock=clock, tick=tick
                )
                console.print(case_table(found))
                rows += found
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # or the next candidate pays for the last one's fragments
    return rows


def ready_device(name: str) -> torch.device:
    if name == "cuda":
        if not torch.cuda.is_available():
            raise click.UsageError("--device cuda: PyTorch finds no GPU here; --device cpu runs anywhere.")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pick(name: str, table: Sequence[Shape], wanted: Sequence[str]) -> list[Shape]:
    known = {shape.name: shape for shape in table}
    unknown = [shape for shape in wanted if shape not in known]
    if unknown:
        raise click.UsageError(f"--shape {unknown[0]}: not among the shapes of {name}: {', '.join(known)}.")
    return [known[shape] for shape in wanted] if wanted else list(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="cpu: fp32; cuda: bf16."
)
@click.option("--quick", is_flag=True, help="One small shape, few calls, no torch.compile: shows that everything runs.")
@click.option(
    "--shape", "names", multiple=True, help="Only this shape, by name (repeatable); benchmarks/shapes.py lists them."
)
@click.option("--mode", "modes", multiple=True, type=click.Choice(list(MODES)), help="Only this mode (repeatable).")
@click.option(
    "--without",
    multiple=True,
    type=click.Choice([candidate.name for candidate in CANDIDATES if candidate.name != OURS]),
    help="Leave out a peer (repeatable).",
)
@click.option("--repeats", type=click.IntRange(1), help="Timed calls of each candidate. Default: 7 on cpu, 30 on cuda.")
@click.option(
    "--busy",
    is_flag=True,
    help="The machine is busy with other work: one thread, and processor time instead of wall time (cpu only).",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the JSON, the Markdown and the plots. Default: benchmarks/results/<device>.",
)
def command(
    device: str,
    quick: bool,
    names: tuple[str, ...],
    modes: tuple[str, ...],
    without: tuple[str, ...],
    repeats: int | None,
    busy: bool,
    out: Path | None,
) -> None:
    """Time linear_logprobs against eager PyTorch, torch.compile, TRL, Liger and cut-cross-entropy.

    Every candidate gets the same tensors in the same process, is first compared with fp64, and is then timed in turns
    with the others and with bare matrix products, the limit. If ours is wrong, nothing is timed, nothing is written,
    and the exit status is 1.

    \b
    python -m benchmarks.kernels --quick --out /tmp/bench     half a minute, to see it work
    python -m benchmarks.kernels                              the CPU table (about ten minutes)
    python -m benchmarks.kernels --device cuda                the GPU table
    python -m benchmarks.kernels --device cuda --shape llama3-8b-8k --mode frozen
    """
    where = ready_device(device)
    if busy and device == "cuda":
        raise click.UsageError("--busy counts processor time, which says nothing of a GPU; leave it out.")
    if busy:
        torch.set_num_threads(1)  # threads that wait for a preempted one would count their waiting
    clock, clock_name = CLOCKS[busy]
    picked = pick(device, (shapes.QUICK if quick else shapes.SHAPES)[device], names)
    wanted = [mode for mode in MODES if not modes or mode in modes]
    chosen = [c for c in CANDIDATES if c.name not in without and not (quick and c.slow_start)]
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS[device])
    line, folder = records.machine(where)
    head, dirty = records.commit()
    load, date = os.getloadavg()[0], records.now()
    console = Console()
    console.print(f"{line}; {torch.__version__}; commit {head[:12]}{' (dirty)' if dirty else ''}", highlight=False)
    rows = run_all(where, picked, wanted, chosen, repeats, clock, console)
    report = Report(
        benchmark=BENCHMARK,
        device=device,
        machine=line,
        folder=folder,
        dtype=str(shapes.DTYPES[device]).removeprefix("torch."),
        quick=quick,
        clock=clock_name,
        repeats=repeats,
        date=date,
        commit=head,
        dirty=dirty or records.commit() != (head, dirty),  # the tree must not have changed under the run either
        load=load,
        versions=records.versions(),
        rows=tuple(rows),
    )
    path = (out or records.ROOT / "benchmarks" / "results" / folder) / records.file_name(report)
    records.save(report, path)
    for made in (path, *render.render(path)):
        console.print(f"wrote {made}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None, entry: click.Command = command) -> int:
    """Errors are one line: of use, status 2; a refusal, status 1."""
    try:
        entry.main(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped: nothing was written", err=True)
        return 130
    except Refused as error:
        click.echo(f"refused: {error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
