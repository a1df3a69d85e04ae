"""What the commands have in common: options, and what they mean."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

CLOCKS = {False: (time.perf_counter, "wall time"), True: (time.process_time, "processor time of one thread")}

DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="cpu: fp32; cuda: bf16."
)
BUSY = click.option(
    "--busy",
    is_flag=True,
    help="The machine is busy with other work: one thread, and processor time instead of wall time (cpu only).",
)


def out_option(written: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--out`, or `--output`: the folder for what is written."""
    return click.option(
        "--out",
        "--output",
        "out",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Folder for {written}. Default: benchmarks/results/<device>.",
    )


FILES = click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))


def readme_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--readme`, of a render command: what is put between which markers."""
    return click.option(
        "--readme",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"Also put {what} and <!-- /benchmark --> in this file.",
    )


def pick_clock(device: str, *, busy: bool) -> tuple[Callable[[], float], str]:
    """The clock and its name; a busy machine's counts one thread's own time."""
    if busy and device == "cuda":
        raise click.UsageError("--busy counts processor time, which says nothing of a GPU; leave it out.")
    if busy:
        torch.set_num_threads(1)  # threads that wait for a preempted one would count their waiting
    return CLOCKS[busy]
