"""The plots of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

from benchmarks import measure, records
from benchmarks.render import COLOURS
from benchmarks.train_step import results
from benchmarks.train_step.results import Report, Result, title
from benchmarks.train_step.watch import PHASES

matplotlib.use("Agg")  # before pyplot is there: no display is asked for
from matplotlib import pyplot
from matplotlib.figure import Figure


def saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    # the same bytes from the same file
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def dpo_plot(report: Report, found: Sequence[Result]) -> bytes:
    """A line of two panels per case: tokens per second with quartiles, and memory."""
    figure, grid = pyplot.subplots(len(found), 2, figsize=(11, 0.8 + 1.9 * len(found)), squeeze=False)
    for (left, right), result in zip(grid, found, strict=True):
        ran = [row for row in result.rows if row.seconds and row.role != records.LIMIT][::-1]
        names, colours = [row.name for row in ran], [COLOURS[row.role] for row in ran]
        rates = [spread for row in ran if (spread := results.rate(row))]
        bars = [[each.median - each.q1 for each in rates], [each.q3 - each.median for each in rates]]
        left.barh(names, [each.median for each in rates], xerr=bars, color=colours, capsize=3)
        left.set(title=title(report, result), xlabel="real tokens/s (median, quartiles)")
        right.barh(names, [(row.held_bytes or 0) / 2**20 for row in ran], color="#d9d9d9", label="weights, optimizer")
        right.barh(
            names,
            [(row.peak_bytes or 0) / 2**20 for row in ran],
            left=[(row.held_bytes or 0) / 2**20 for row in ran],
            color=colours,
        )
        right.set(xlabel="peak memory, MiB (grey: weights and optimizer)")
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
    return saved(figure)


def ppo_plot(report: Report, found: Sequence[Result]) -> bytes:
    """Two panels per case: seconds and memory of each phase."""
    figure, grid = pyplot.subplots(len(found), 2, figsize=(11, 0.8 + 2.2 * len(found)), squeeze=False)
    for (left, right), result in zip(grid, found, strict=True):
        rows = [row for name in reversed(PHASES) if (row := results.named(result, name)) is not None and row.seconds]
        names = [row.name for row in rows]
        left.barh(names, [measure.spread(row.seconds).median for row in rows], color=COLOURS["ours"])
        left.set(title=title(report, result), xlabel=f"{report.clock}, s (median)")
        right.barh(names, [(row.peak_bytes or 0) / 2**20 for row in rows], color=COLOURS["ours"])
        right.set(xlabel="peak memory above weights and optimizer, MiB")
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
    return saved(figure)


PLOTS = {"dpo": dpo_plot, "ppo": ppo_plot}
