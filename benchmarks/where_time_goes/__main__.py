"""`python -m benchmarks.where_time_goes`: a PPO iteration by phase and operator, and its largest avoidable costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks import options, records
from benchmarks.kernels import main as guarded
from benchmarks.kernels import ready_device
from benchmarks.train_step import results as versions
from benchmarks.train_step.__main__ import picked
from benchmarks.train_step.dpo import quiet
from benchmarks.train_step.run import TOO_MUCH, parameters_of, reason
from benchmarks.where_time_goes import record
from benchmarks.where_time_goes.iteration import measured


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options.DEVICE
@click.option("--case", "name", default="", help="A PPO case of benchmarks.train_step, by name. Default: the first.")
@click.option("--smoke", is_flag=True, help="A GPU's case at tiny sizes: shows that it runs, and measures nothing.")
@options.out_option("the JSON and the Markdown")
@click.option(
    "--render",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: make the Markdown of this JSON again (repeatable).",
)
def command(device: str, name: str, smoke: bool, out: Path | None, files: tuple[Path, ...]) -> None:
    """One warmed-up PPO iteration by the stopwatch, and one under the profiler.

    Seconds are the stopwatch's. The profiler says what they went into: operators by their own time, on a GPU kernels,
    how long the GPU was idle, and what of it a rule calls avoidable.
    """
    if files:
        try:
            for path in files:
                for made in record.render(path):
                    click.echo(f"wrote {made}")
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        return
    where = ready_device(device)
    (case, *_) = picked(device, ["ppo"], [name] if name else [], quick=False, smoke=smoke)
    quiet()
    dtype = torch.bfloat16 if smoke or device == "cuda" else torch.float32
    about = {**records.header(where), "versions": versions.versions()}
    console = Console()
    console.print(records.opening(about), highlight=False)
    try:
        with console.status("") as status:
            found = measured(case, where, dtype, lambda words: status.update(f"{case.name}: {words}"))
    except TOO_MUCH as error:
        raise click.ClickException(f"--case {case.name!r}: {reason(error)}") from None
    report = record.Report(
        **{**about, "dirty": records.is_dirty(about["commit"], dirty=about["dirty"])},
        case=case.name,
        model=case.model.name,
        parameters=parameters_of(case),
        dtype=str(dtype).removeprefix("torch."),
        settings=case.settings,
        quick=smoke,
        **record.results(found, device),
    )
    stamped = records.stamped(
        record.BENCHMARK, report.date, report.commit, records.slug(case.name), dirty=report.dirty, quick=smoke
    )
    path = (out or records.ROOT / "benchmarks" / "results" / report.folder) / stamped
    records.save(report, path)
    click.echo(record.phase_table(report))
    click.echo("\n" + record.cost_table(report, report.costs))
    for made in (path, *record.render(path)):
        click.echo(f"wrote {made}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Errors are one line, status 2."""
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
