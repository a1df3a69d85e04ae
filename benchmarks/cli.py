"""What the commands share: options, clocks and one-line errors."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.measure import Timing
from benchmarks.records import Recorder

CLOCKS = {False: (time.perf_counter, "wall time"), True: (time.process_time, "processor time of one thread")}
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

OUT = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the JSON, the Markdown and the plots. Default: benchmarks/results/<device>.",
)
DEVICE = click.option(
    "--device",
    "name",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cpu: fp32; cuda: bf16.",
)
SOME = {
    "minutes": click.option("--minutes", type=click.FloatRange(min=0), help="Begin no case after so many minutes."),
    "repeats": click.option("--repeats", type=click.IntRange(1), help="Timed rounds of a case. Default: the device's."),
    "busy": click.option("--busy", is_flag=True, help="On a machine that others use (cpu only): one thread's time."),
}


@dataclass(frozen=True)
class Options:
    """The common options of a benchmark."""

    device: torch.device
    clock: Callable[[], float]
    clock_name: str
    repeats: int | None
    minutes: float | None
    out: Path | None

    def timing(self, usual: Timing) -> Timing:
        """The usual timing by this clock. All of the rounds that were asked for are made."""
        if self.repeats is not None:
            usual = replace(usual, repeats=self.repeats, budget=math.inf)
        return replace(usual, clock=self.clock)

    def recorder(self, benchmark: str, repeats: int, *, quick: bool = False, name: str = "") -> Recorder:
        return Recorder(
            benchmark, self.device, clock=self.clock_name, repeats=repeats, quick=quick, out=self.out, name=name
        )


def options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command --device, --out and these of the others, as one record before its own options."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_options(
            name: str,
            out: Path | None,
            minutes: float | None = None,
            repeats: int | None = None,
            busy: bool = False,
            **own: Any,
        ) -> None:
            device = ready_device(name)
            if busy and name == "cuda":
                raise click.UsageError("--busy counts processor time, which says nothing of a GPU; leave it out.")
            if busy:
                torch.set_num_threads(1)  # threads that wait for a preempted one would count their waiting
            command(Options(device, *CLOCKS[busy], repeats, minutes, out), **own)

        made = with_options
        for option in (OUT, *(SOME[name] for name in reversed(names)), DEVICE):
            made = option(made)
        return made

    return add


class Refused(Exception):
    """Ours is wrong or does not run, so nothing is timed. Exit status 1."""


def ready_device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch finds no GPU here; --device cpu runs anywhere.")
    return torch.device("cuda", torch.cuda.current_device())


def refuse_unused_gpu(device: torch.device) -> None:
    """For benchmarks that run the engine, which takes the GPU that is there."""
    if device.type == "cpu" and torch.cuda.is_available():
        raise click.UsageError("--device cpu: the engine takes the GPU that is here; set CUDA_VISIBLE_DEVICES= for it.")


def main(entry: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command. Errors are one line: of use, status 2; a refusal, status 1."""
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
