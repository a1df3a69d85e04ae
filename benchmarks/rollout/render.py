"""`python -m benchmarks.rollout.render FILE.json...`: the Markdown table and the plot of a run."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import matplotlib

from benchmarks import measure, options, records, tables
from benchmarks.kernels import main as guarded
from benchmarks.render import COLOURS, put, run, table
from benchmarks.rollout import record
from benchmarks.rollout.record import Report, Result

matplotlib.use("Agg")  # before pyplot is there: no display is asked for
from matplotlib import pyplot

NONE = tables.NONE
HEADINGS = ("", "tokens/s", "quartiles", "ms a step", "of the reading's rate", "peak above weights, MiB")


def lines(result: Result) -> list[list[str]]:
    """A line for each sampler."""
    step = result.step
    found = []
    for row in result.rows:
        taken = None if step is None else step.seconds[row.sampler]
        found.append(
            [
                row.sampler,
                f"{row.rate.median:,.0f}",
                f"{row.rate.q1:,.0f} to {row.rate.q3:,.0f}",
                tables.milliseconds(taken),
                f"{step.floor / taken:.0%}" if step is not None and taken else NONE,
                tables.mebibytes(row.peak_bytes),
            ]
        )
    return found


def sizes(result: Result) -> str:
    least, most = result.prompt_lengths
    mean = "" if result.mean_response is None else f", {result.mean_response:.0f} on average"
    return (
        f"{result.model}, {result.parameters / 1e6:,.0f}M parameters, {result.dtype}"
        f"{', load_in_4bit' if result.load_in_4bit else ''}; {result.prompts} prompts of {least} to {most} tokens, "
        f"{result.batch_size} at a time; answers of at most {result.max_new_tokens} tokens{mean}; "
        f"temperature {result.temperature:g}"
    )


def step_line(result: Result) -> str:
    step = result.step
    if step is None:
        return ""
    return (
        f"A step: {step.rows} rows with {step.length:,} tokens each in the cache. Weights and cache are "
        f"{step.bytes_read / 2**20:,.0f} MiB, read in {tables.milliseconds(step.floor)} ms at the "
        f"{step.bandwidth / 1e9:,.0f} GB/s of a plain copy in this run."
    )


def provenance(report: Report) -> str:
    """One line: where, when, and from which code."""
    return tables.provenance_of(report, f"median of {tables.rounds(report)} rounds, {report.clock}")


def markdown(report: Report, name: str) -> str:
    """All the cases of a run."""
    parts = [
        f"# Rollouts on {report.folder}",
        provenance(report),
        f"Made from {name} by `python -m benchmarks.rollout.render`; how to read it: the README of `benchmarks/`.",
    ]
    for result in report.results:
        parts += [f"## {result.name}", f"{sizes(result)}."]
        if result.refused is not None:
            parts.append(f"REFUSED, nothing is reported: {result.refused}")
            continue
        parts += [table(HEADINGS, lines(result)), f"{record.verdict(result)}. {step_line(result)}".rstrip()]
    return "\n\n".join(parts) + "\n"


def brief(result: Result) -> str:
    """A few lines for the terminal."""
    if result.refused is not None:
        return f"{result.name}: REFUSED, {result.refused}"
    shown = [*lines(result), [record.verdict(result)], [step_line(result)]]
    return "\n".join([result.name, *("  " + " | ".join(cell for cell in line if cell) for line in shown if any(line))])


def summary(report: Report, name: str) -> str:
    """The README's table: a line per case."""
    rows = []
    for result in report.results:
        if result.ratio is None:
            continue
        mine, theirs = (f"{row.rate.median:,.0f}" for row in (result.rows[0], result.rows[-1]))
        spread: measure.Spread = result.ratio
        rows.append([result.name, mine, theirs, f"{spread.median:.2f}x ({spread.q1:.2f} to {spread.q3:.2f})"])
    headings = ("rollout", "onecard, tokens/s", "generate, tokens/s", "faster by")
    return f"{table(headings, rows)}\n\n{provenance(report)} From `{name}`."


def plot(report: Report) -> bytes:
    """A line of two panels per case: tokens per second with quartiles, and milliseconds a step beside the reading's."""
    found = [result for result in report.results if result.rows]
    figure, grid = pyplot.subplots(len(found), 2, figsize=(11, 0.8 + 1.6 * len(found)), squeeze=False)
    for (left, right), result in zip(grid, found, strict=True):
        rows = result.rows[::-1]
        names, colours = [row.sampler for row in rows], [COLOURS[row.role] for row in rows]
        rates = [row.rate for row in rows]
        bars = [[each.median - each.q1 for each in rates], [each.q3 - each.median for each in rates]]
        left.barh(names, [each.median for each in rates], xerr=bars, color=colours, capsize=3)
        left.set(title=result.name, xlabel="response tokens/s (median, quartiles)")
        if result.step is not None:
            right.barh(names, [result.step.seconds[name] * 1e3 for name in names], color=colours)
            right.axvline(result.step.floor * 1e3, color="black", linestyle="--")
            right.set(xlabel="ms a step (dashed: reading weights and cache)")
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # the same bytes from the same file
    pyplot.close(figure)
    return buffer.getvalue()


def render(path: Path) -> list[Path]:
    """Writes the Markdown file and the plot beside a report."""
    report = record.load(path)
    made = [path.with_suffix(".md")]
    records.write_atomically(made[0], markdown(report, path.name).encode())
    if any(result.rows for result in report.results):
        made.append(path.with_suffix(".png"))
        records.write_atomically(made[-1], plot(report))
    return made


def update_readme(readme: Path, path: Path) -> None:
    """Put the summary between its markers; other blocks stay as they are."""
    put(readme, path, lambda name: {record.BENCHMARK: summary(record.load(path), name)})


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options.FILES
@options.readme_option("the summary between <!-- benchmark:rollout -->")
def command(files: tuple[Path, ...], readme: Path | None) -> None:
    """Make the Markdown table and the plot of each FILE, beside it. Numbers come from the file alone."""
    run(files, readme, render, update_readme)


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
