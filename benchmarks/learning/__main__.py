"""`python -m benchmarks.learning`: the training commands on a real small model, held to bars; docs/results.md."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import records
from benchmarks.cases import Refused
from benchmarks.kernels import main as guarded
from benchmarks.learning.data import SHARED
from benchmarks.learning.page import found_of, write_page
from benchmarks.learning.running import jobs_of, run_all
from benchmarks.learning.tasks import TASKS


@click.command(context_settings={"max_content_width": 120})
@click.option("--only", multiple=True, type=click.Choice(list(TASKS)), help="A task; several times. Default: all.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Seeds 1 to N of each task.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(min=1), help="Runs at a time.")
@click.option("--output", default="runs/results", show_default=True, help="Folder of the runs.")
@click.option("--page", default="docs/results.md", show_default=True, help="The page to write; a PNG goes beside it.")
@click.option("--render", is_flag=True, help="Write the page from the runs that are there; run nothing.")
def command(only: tuple[str, ...], seeds: int, jobs: int, output: str, page: str, render: bool) -> None:
    """Run each task of the table through the `onecard` command line, and write the page with what came out.

    A finished run is kept: it is run again only where its command has changed (or its folder is removed). The page
    always has all tasks, with the runs that are there. A run that fails is named, and the exit status is 1.

    \b
    python -m benchmarks.learning                             all of it (a quarter of an hour on two idle cores)
    python -m benchmarks.learning --only sft --seeds 1        one run
    python -m benchmarks.learning --render                    the page again
    """
    console = Console(stderr=True)
    all_jobs = jobs_of(Path(output), seeds)
    failures: list[str] = []
    if not render:
        if not (records.ROOT / SHARED).is_dir():
            raise click.UsageError(f"needs models and data in {SHARED} beside the repository, which is not there.")
        wanted = {name for name in TASKS if not only or name in only}
        wanted |= {TASKS[name].against for name in wanted} - {""}
        chosen = [job for name in TASKS if name in wanted for job in all_jobs[name]]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            line = progress.add_task("learning", total=len(chosen))
            failures = run_all(
                chosen, jobs, lambda names, done: progress.update(line, completed=done, description=" ".join(names))
            )
    found = found_of(all_jobs)
    for path in write_page(Path(page), found):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if failures:
        raise Refused("; ".join(failures))


if __name__ == "__main__":
    sys.exit(guarded(entry=command))
