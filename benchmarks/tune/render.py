"""`python -m benchmarks.tune.render FILE.json...`: the proposal and the tables of a sweep, as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import options, records, render, tables
from benchmarks.kernels import main as guarded
from benchmarks.tune import proposal
from benchmarks.tune.knobs import KNOBS

KIND = "tune"
HEADINGS = ("knob", "mode", "shape", "default, ms", "best setting", "its ms", "time / default", "verdict")


@dataclass(frozen=True)
class Report(records.Report):
    """A sweep; each result is a knob's, its rows the settings."""

    kind: str = KIND
    left_out: tuple[str, ...] = ()  # knobs and shapes that the time did not suffice for


def load(path: Path) -> Report:
    def build(values: dict[str, Any]) -> Report:
        results = tuple(records.result_of(found) for found in values.pop("results"))
        unknown = [result.benchmark for result in results if result.benchmark not in KNOBS]
        if unknown:
            raise ValueError(f"knob {unknown[0]!r}, expected one of {', '.join(KNOBS)}")
        return Report(results=results, **{**values, "left_out": tuple(values["left_out"])})

    return records.read(path, "report of benchmarks.tune", {"schema": records.SCHEMA, "kind": KIND}, build)


def summary(report: Report, name: str) -> str:
    """The best setting of every case, and the lines to put in."""
    found = [best for result in report.results if result.rows for best in proposal.best_of(result)]
    lines = [
        [
            best.knob,
            best.row.mode,
            tables.size(best.row),
            spread(best.default),
            best.row.candidate,
            spread(best.row),
            f"{best.ratio.median:.3f} ({best.ratio.q1:.3f} to {best.ratio.q3:.3f})",
            best.verdict,
        ]
        for best in found
    ]
    proposals = [made for result in report.results if (made := proposal.proposed(result, report.device)) is not None]
    put = [f"- {p.knob}, {p.setting} ({p.ratio:.3f} of the default's time): `{p.line}`" for p in proposals]
    parts = [
        render.table(HEADINGS, lines),
        "\n".join(put) or "No setting is faster than its default beyond the spread in one case and slower in none.",
    ]
    if report.left_out:
        parts.append(f"Not begun, the time was over: {'; '.join(report.left_out)}.")
    return "\n\n".join([*parts, f"{tables.provenance(report)} From `{name}`."])


def spread(row: records.Row) -> str:
    return f"{tables.milliseconds(row.median)} ({tables.milliseconds(row.q1)} to {tables.milliseconds(row.q3)})"


def markdown(report: Report, name: str) -> str:
    parts = [
        f"# Tuning on {report.folder}",
        f"Made from {name} by `python -m benchmarks.tune.render`; how to read it: the README of `benchmarks/`.",
        "## Proposal",
        summary(report, name),
    ]
    for result in report.results:
        parts.append(f"## {result.benchmark}")
        parts.append(f"`{result.benchmark}` of {result.about}. Inputs: {result.dtype}.")
        if result.refused is not None:
            parts.append(f"REFUSED: {result.refused}")
        for rows in tables.cases(result.rows).values():
            ours, columns = tables.ours_of(rows), tables.columns_of(rows)
            parts.append(f"### {result.modes[rows[0].mode]}: {result.axes} = {tables.size(rows[0])} ({rows[0].shape})")
            parts.append(render.table(columns.headings, [columns.cells(row, ours) for row in rows]))
    return "\n\n".join(parts) + "\n"


def render_file(path: Path) -> list[Path]:
    """Writes the Markdown file beside a report."""
    made = path.with_suffix(".md")
    records.write_atomically(made, markdown(load(path), path.name).encode())
    return [made]


def update(readme: Path, path: Path) -> None:
    """The summary between <!-- benchmark:tune --> and its end."""
    render.put(readme, path, lambda name: {KIND: summary(load(path), name)})


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options.FILES
@options.readme_option("the summary between <!-- benchmark:tune -->")
def command(files: tuple[Path, ...], readme: Path | None) -> None:
    """Make the Markdown tables of each FILE, beside it: what is proposed, then every knob. Numbers come from the file.

    \b
    python -m benchmarks.tune.render benchmarks/results/DEVICE/tune-*.json
    python -m benchmarks.tune.render RUN.json --readme benchmarks/NOTES.md
    """
    render.run(files, readme, render_file, update)


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
