"""`python -m benchmarks.render FILE.json...`: the Markdown table and the plots of a run, and the README's table."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import matplotlib

from benchmarks import records, tables
from benchmarks.candidates import OURS
from benchmarks.records import LIMIT, Report, Row
from benchmarks.shapes import MODES

matplotlib.use("Agg")  # before pyplot is there: no display is asked for
from matplotlib import pyplot

COLOURS = {"ours": "#1b7837", "peer": "#9e9e9e", LIMIT: "#d9d9d9"}


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    marks = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join([line(headings), line(marks), *[line(values) for values in lines]])


def size(row: Row) -> str:
    return f"{row.tokens} x {row.hidden} x {row.vocab}"


def markdown(report: Report, name: str) -> str:
    """All the rows of a run."""
    parts = [
        f"# {report.benchmark} on {report.folder}",
        tables.provenance(report),
        f"Made from {name} by `python -m benchmarks.render`; how to read it: the README of `benchmarks/`.",
    ]
    for rows in tables.cases(report.rows).values():
        ours = tables.ours_of(rows)
        parts.append(f"## {MODES[rows[0].mode]}: N x D x V = {size(rows[0])} ({rows[0].shape})")
        parts.append(table(tables.HEADINGS, [tables.cells(row, ours) for row in rows]))
    return "\n\n".join(parts) + "\n"


def summary(report: Report, name: str) -> str:
    """The README's table: a line per case, a column per candidate, time over ours and peak memory."""
    grouped = tables.cases(report.rows)
    names = list(dict.fromkeys(row.candidate for row in report.rows if row.role != LIMIT))
    ran = [n for n in names if any(row.median is not None for row in report.rows if row.candidate == n)]
    lines, absent = [], {}
    for rows in grouped.values():
        ours, by_name = tables.ours_of(rows), {row.candidate: row for row in rows}
        against = tables.ratio(next(row for row in rows if row.role == LIMIT and row.gemms), ours)
        shown = [short(by_name[n], ours) if n in by_name else tables.NONE for n in ran]
        bare = tables.NONE if against is None else f"{against.median:.2f}x"
        lines.append([rows[0].mode, size(rows[0]), *shown, bare])
        absent.update({row.candidate: row.reason for row in rows if row.reason is not None})
    text = table(["pass", "N x D x V", *ran, "bare GEMMs"], lines)
    missing = "".join(f" {n}: {reason}." for n, reason in absent.items() if n not in ran)
    return (
        f"{text}\n\nTime relative to {OURS} (smaller is faster) and peak memory above the inputs. "
        f"{tables.provenance(report)}{missing} From `{name}`."
    )


def short(row: Row, ours: Row) -> str:
    if row.median is None:
        return row.reason or tables.NONE
    against = tables.ratio(row, ours)
    return f"{tables.NONE if against is None else f'{against.median:.2f}x'}, {tables.mebibytes(row.peak_bytes)} MiB"


def plot(report: Report, mode: str) -> bytes:
    """A line of two panels per shape: time with quartiles, and peak memory."""
    groups = [rows for (_, of), rows in tables.cases(report.rows).items() if of == mode]
    figure, grid = pyplot.subplots(len(groups), 2, figsize=(11, 0.8 + 2.2 * len(groups)), squeeze=False)
    for (left, right), rows in zip(grid, groups, strict=True):
        ran = [row for row in rows if row.median is not None and row.candidate != "copy"][::-1]
        names, colours = [row.candidate for row in ran], [COLOURS[row.role] for row in ran]
        medians = [row.median * 1e3 for row in ran]
        low = [(row.median - row.q1) * 1e3 for row in ran]
        high = [(row.q3 - row.median) * 1e3 for row in ran]
        left.barh(names, medians, xerr=[low, high], color=colours, capsize=3)
        left.set(title=f"N x D x V = {size(rows[0])}", xlabel=f"{report.clock}, ms (median, quartiles)")
        held = [row for row in ran if row.peak_bytes is not None]
        bars = right.barh(
            [row.candidate for row in held],
            [row.peak_bytes / 2**20 for row in held],
            color=[COLOURS[row.role] for row in held],
        )
        right.bar_label(bars, labels=[tables.mebibytes(row.peak_bytes) for row in held], padding=3)
        right.set(xlabel="peak memory above the inputs, MiB")
        right.margins(x=0.18)
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
    notes = "".join(f", {text}" for text, on in (("dirty tree", report.dirty), ("quick run", report.quick)) if on)
    figure.suptitle(f"{report.benchmark}, {MODES[mode]}\n{report.folder}, {report.dtype}{notes}", fontsize=11)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # the same bytes from the same file
    pyplot.close(figure)
    return buffer.getvalue()


def render(path: Path) -> list[Path]:
    """Writes the Markdown file and the plots beside a report."""
    report = records.load(path)
    made = [path.with_suffix(".md")]
    records.write_atomically(made[0], markdown(report, path.name).encode())
    for mode in dict.fromkeys(row.mode for row in report.rows):
        made.append(path.with_name(f"{path.stem}-{mode}.png"))
        records.write_atomically(made[-1], plot(report, mode))
    return made


def updated(text: str, benchmark: str, body: str) -> str:
    """`text` with `body` between the markers of `benchmark`, and all else as it was. Doing it twice changes nothing."""
    opening, closing = f"<!-- benchmark:{benchmark} -->", "<!-- /benchmark -->"
    pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one block of {opening} ... {closing}, found {len(pattern.findall(text))}")
    return pattern.sub(lambda _: f"{opening}\n{body}\n{closing}", text)


def update_readme(readme: Path, path: Path) -> None:
    report = records.load(path)
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{readme}: {error.strerror}") from None
    try:
        name = path.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:
        name = path.name
    try:
        new = updated(text, report.benchmark, summary(report, name))
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from None
    records.write_atomically(readme, new.encode())


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--readme",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also put the summary of FILE between <!-- benchmark:NAME --> and <!-- /benchmark --> in this file.",
)
def command(files: tuple[Path, ...], readme: Path | None) -> None:
    """Make the Markdown table and the plots of each FILE, beside it. Numbers come from the file alone.

    \b
    python -m benchmarks.render benchmarks/results/cpu-2-cores/*.json
    python -m benchmarks.render benchmarks/results/cpu-2-cores/RUN.json --readme README.md
    """
    if readme is not None and len(files) > 1:
        raise click.UsageError("--readme takes its numbers from one FILE; give one.")
    try:
        for path in files:
            for made in render(path):
                click.echo(f"wrote {made}")
        if readme is not None:
            update_readme(readme, files[0])
            click.echo(f"updated {readme}")
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        command.main(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
