"""Numbers on their way from a loss function to `metrics.jsonl` and the progress bar.

Every metric of a loss is already divided by the step's normaliser, so the micro-batches of a step add up.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onecard_kernels import Loss

# What the progress bar shows when a row has it: name -> (label, format)
SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "rewards/accuracies": ("accuracy", "{:.2f}"),
    "rewards/margins": ("margin", "{:.2f}"),
    "time/tokens_per_second": ("tokens/s", "{:,.0f}"),
    "memory/peak_gib": ("peak GiB", "{:.2f}"),
}


def add_up(losses: Iterable[Loss]) -> dict[str, float]:
    """Sum the loss and metrics of a step's micro-batches. The one place that waits for the device."""
    total: dict[str, torch.Tensor] = {}
    for loss in losses:
        for name, value in {"loss": loss.loss.detach(), **loss.metrics}.items():
            total[name] = total[name] + value if name in total else value
    return {name: float(value) for name, value in total.items()}


def peak_memory_gib() -> float:
    """Peak so far: allocated on the GPU where there is one, else the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # Linux counts in KiB


class Window:
    """Sums of per-step metrics since the last logged row. Goes into checkpoints, so that a resumed row is the same."""

    def __init__(self, sums: dict[str, float] | None = None, steps: int = 0) -> None:
        self.sums = dict(sums or {})
        self.steps = steps

    def add(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """The means, and begin again."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}


console = Console(stderr=True)


def say(message: str) -> None:
    """A plain line for the user, on standard error so that results on standard output stay clean."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def progress(label: str, total: int) -> Bar:
    """A progress bar with the metrics of `SHOWN` at its end."""
    return Bar(label, total)


class Bar(AbstractContextManager["Bar"]):
    """`with progress("dpo", 100) as bar: bar.advance(row)`."""

    def __init__(self, label: str, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[shown]}"),
        )
        self.rich = Progress(*columns, console=console)
        self.task = self.rich.add_task(label, total=total, shown="")

    def __enter__(self) -> Bar:
        self.rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.rich.stop()

    @contextmanager
    def part(self, label: str, total: int) -> Iterator[Bar]:
        """A second line for a job within the job; it goes when that job is done."""
        part = Bar.__new__(Bar)
        part.rich = self.rich
        part.task = self.rich.add_task(label, total=total, shown="")
        try:
            yield part
        finally:
            self.rich.remove_task(part.task)

    def advance(self, row: dict[str, float] | None = None, by: int = 1) -> None:
        """Move on; `row` replaces the metrics shown."""
        if row is None:
            self.rich.update(self.task, advance=by)
            return
        shown = "  ".join(f"{label} {form.format(row[name])}" for name, (label, form) in SHOWN.items() if name in row)
        self.rich.update(self.task, advance=by, shown=shown)
