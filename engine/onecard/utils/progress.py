"""Messages and progress bars on standard error. Standard output is for results only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onecard.utils.errors import escape_controls

# Metric -> its format in the progress bar. The formats are short, so that the line fits into 80 columns.
METRIC_FORMATS = {
    "loss": "loss {:.3f}",
    "accuracy": "acc {:.2f}",
    "rewards/accuracies": "acc {:.2f}",
    "rewards/margins": "margin {:.2f}",
    "objective/scores": "score {:.2f}",
    "objective/kl": "KL {:.2f}",
    "time/tokens_per_second": "{:,.0f} tok/s",
    "memory/peak_gib": "{:.1f} GiB",
}


console = Console(stderr=True)


def say(message: str) -> None:
    """Print a message on standard error, with control characters escaped."""
    console.print(escape_controls(message), highlight=False, markup=False, soft_wrap=True)


class Bar:
    """A progress bar: call `bar.advance(metrics)` after each step."""

    def __init__(self, rich: Progress, label: str, total: int | None) -> None:
        self.rich = rich
        self.task = rich.add_task(label, total=total, shown="")

    def advance(self, metrics: Mapping[str, float] | None = None, by: int = 1) -> None:
        """Advance by `by` steps. `metrics` replaces the metrics that are shown; None leaves them."""
        if metrics is None:
            self.rich.update(self.task, advance=by)
            return
        shown = " ".join(template.format(metrics[name]) for name, template in METRIC_FORMATS.items() if name in metrics)
        self.rich.update(self.task, advance=by, shown=shown)

    @contextmanager
    def part(self, label: str, total: int) -> Iterator[Bar]:
        """A second progress bar for a part of the work. It is removed at the end."""
        part = Bar(self.rich, label, total)
        try:
            yield part
        finally:
            self.rich.remove_task(part.task)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Bar]:
    """`with progress("dpo", 100) as bar: ...` shows a progress bar with the metrics in `METRIC_FORMATS`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=console) as rich:
        yield Bar(rich, label, total)
