"""`python -m benchmarks.train_step`: DPO steps against TRL's `DPOTrainer`, and PPO by phases. Writes JSON."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks import options, records
from benchmarks.cases import closing
from benchmarks.kernels import main as guarded
from benchmarks.kernels import ready_device
from benchmarks.train_step import cases, render, results
from benchmarks.train_step.cases import Case
from benchmarks.train_step.dpo import quiet
from benchmarks.train_step.results import Report
from benchmarks.train_step.run import Timing, measure_case

REPEATS = {"cpu": 7, "cuda": 10}
BUDGET = {"cpu": 60.0, "cuda": 30.0}  # seconds of timed rounds a case
WARMUP = {"cpu": 1, "cuda": 2}


def picked(device: str, kinds: Sequence[str], names: Sequence[str], *, quick: bool, smoke: bool) -> list[Case]:
    """The cases that were asked for, in their order."""
    found = cases.on_a_gpu() if smoke or device == "cuda" else cases.on_cpu()
    unknown = sorted(set(names) - {case.name for case in found})
    if unknown:
        known = ", ".join(dict.fromkeys(repr(case.name) for case in found))
        raise click.UsageError(f"--case {unknown[0]!r}: not among those of {device}: {known}.")
    if quick:
        found = cases.quick(found)
    if smoke:
        found = [cases.tiny(case) for case in found]
    found = [case for case in found if (not kinds or case.kind in kinds) and (not names or case.name in names)]
    if not found:
        raise click.UsageError("--only, --case and --quick: no case is all of them.")
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="cpu: fp32; cuda: bf16."
)
@click.option("--quick", is_flag=True, help="The first DPO and the first PPO case, few rounds.")
@click.option(
    "--smoke",
    is_flag=True,
    help="A GPU's cases at tiny sizes: shows on any machine that they run, and measures nothing.",
)
@click.option("--only", "kinds", multiple=True, type=click.Choice(["dpo", "ppo"]), help="Only this algorithm.")
@click.option("--case", "names", multiple=True, help="Only this case, by name (repeatable).")
@click.option("--minutes", type=click.FloatRange(min=0), help="No case is begun after so many minutes.")
@click.option("--repeats", type=click.IntRange(1), help="Timed rounds of each case, at any cost. Default: 7 or 10.")
@options.BUSY
@options.out_option("the JSON, the Markdown and the plots")
@click.option(
    "--data-only", is_flag=True, help="Write the JSON alone; benchmarks.train_step.render makes the rest later."
)
def command(
    device: str,
    quick: bool,
    smoke: bool,
    kinds: tuple[str, ...],
    names: tuple[str, ...],
    minutes: float | None,
    repeats: int | None,
    busy: bool,
    out: Path | None,
    data_only: bool,
) -> None:
    """Time whole training steps: DPO against TRL's DPOTrainer, PPO by phases.

    Both DPO trainers get the same weights, adapters, pairs and settings. A case in which loss, rewards and gradient
    norm of the first step do not agree is not timed, and the exit status is 1. The file is written after every case.
    """
    where = ready_device(device)
    if device == "cpu" and torch.cuda.is_available():
        raise click.UsageError("--device cpu: the engine takes the GPU that is here; set CUDA_VISIBLE_DEVICES= for it.")
    chosen = picked(device, kinds, names, quick=quick, smoke=smoke)
    clock, clock_name = options.pick_clock(device, busy=busy)
    few = quick or smoke
    timing = Timing(
        repeats=repeats or (3 if few else REPEATS[device]),
        warmup=0 if few else WARMUP[device],
        budget=math.inf if repeats else 0.0 if few else BUDGET[device],
        clock=clock,
    )
    quiet()
    about = {**records.header(where), "versions": results.versions()}
    report = Report(**about, quick=few, complete=False, clock=clock_name)
    console = Console()
    console.print(records.opening(about), highlight=False)
    path = (out or records.ROOT / "benchmarks" / "results" / report.folder) / results.file_name(report)
    dtype = torch.bfloat16 if smoke or device == "cuda" else torch.float32
    began, left_out = time.monotonic(), 0
    for case in chosen:
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            left_out += 1
            continue
        with console.status("") as status:
            result = measure_case(case, where, dtype, timing, status.update)
        report = replace(report, results=(*report.results, result))
        records.save(report, path)
        console.print(render.brief(result), highlight=False)
    report = replace(report, complete=left_out == 0, dirty=records.is_dirty(report.commit, dirty=report.dirty))
    if report.results:
        records.save(report, path)
        for made in (path, *([] if data_only else render.render(path))):
            console.print(f"wrote {made}", highlight=False, soft_wrap=True)
    closing(report.results, left_out, minutes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Errors are one line: of use, status 2; a refusal, status 1."""
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
