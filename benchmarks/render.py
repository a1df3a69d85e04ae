"""`python -m benchmarks.render FILE.json...`: the Markdown table and the plots of a run, and the README's table."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click
import matplotlib

from benchmarks import options, records, tables, targets
from benchmarks.anatomy import OURS
from benchmarks.records import LIMIT, Report, Result, Row

matplotlib.use("Agg")  # before pyplot is there: no display is asked for
from matplotlib import pyplot

COLOURS = {"ours": "#1b7837", "peer": "#9e9e9e", LIMIT: "#d9d9d9"}


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    marks = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join([line(headings), line(marks), *[line(values) for values in lines]])


def markdown(report: Report, name: str) -> str:
    """All the rows of a run, and the verdicts on its targets."""
    parts = [
        f"# Kernels on {report.folder}",
        tables.provenance(report),
        f"Made from {name} by `python -m benchmarks.render`; how to read it: the README of `benchmarks/`.",
    ]
    judged = targets.verdicts(report)
    if judged:
        lines = [verdict.cells for verdict in judged]
        parts += [f"## {targets.heading(report)}", table(targets.HEADINGS, lines)]
    for result in report.results:
        parts.append(f"## {result.benchmark}")
        parts.append(f"{result.about[0].upper()}{result.about[1:]}. Inputs: {result.dtype}.")
        if result.refused is not None:
            parts.append(f"REFUSED, nothing was timed: {result.refused}")
        for rows in tables.cases(result.rows).values():
            ours, columns = tables.ours_of(rows), tables.columns_of(rows)
            parts.append(f"### {result.modes[rows[0].mode]}: {result.axes} = {tables.size(rows[0])} ({rows[0].shape})")
            parts.append(table(columns.headings, [columns.cells(row, ours) for row in rows]))
    return "\n\n".join(parts) + "\n"


def summary(report: Report, result: Result, name: str) -> str:
    """A README's table: a line per case, a column per candidate, time over ours and peak memory."""
    grouped = tables.cases(result.rows)
    names = list(dict.fromkeys(row.candidate for row in result.rows if row.role != LIMIT))
    ran = [n for n in names if any(row.median is not None for row in result.rows if row.candidate == n)]
    bare = any(row.gemms for row in result.rows)
    lines, absent = [], {}
    for rows in grouped.values():
        ours, by_name = tables.ours_of(rows), {row.candidate: row for row in rows}
        shown = [short(by_name[n], ours) if n in by_name else tables.NONE for n in ran]
        against = [tables.ratio(row, ours) for row in rows if row.gemms]
        lines.append(
            [rows[0].mode, tables.size(rows[0]), *shown, *(f"{a.median:.2f}x" if a else tables.NONE for a in against)]
        )
        absent.update({row.candidate: row.reason for row in rows if row.reason is not None})
    text = table(["pass", result.axes, *ran, *(["bare GEMMs"] if bare else [])], lines)
    missing = "".join(f" {n}: {reason}." for n, reason in absent.items() if n not in ran)
    return (
        f"{text}\n\nTime relative to {OURS} (smaller is faster) and peak memory above the inputs ({result.dtype}). "
        f"{tables.provenance(report)}{missing} From `{name}`."
    )


def short(row: Row, ours: Row) -> str:
    if row.median is None:
        return tables.NONE
    against = tables.ratio(row, ours)
    return f"{tables.NONE if against is None else f'{against.median:.2f}x'}, {tables.mebibytes(row.peak_bytes)} MiB"


def plot(report: Report, result: Result, mode: str) -> bytes:
    """A line of two panels per shape: time with quartiles, and peak memory."""
    groups = [rows for (_, of), rows in tables.cases(result.rows).items() if of == mode]
    figure, grid = pyplot.subplots(len(groups), 2, figsize=(11, 0.8 + 2.2 * len(groups)), squeeze=False)
    for (left, right), rows in zip(grid, groups, strict=True):
        ran = [row for row in rows if row.median is not None and row.candidate != "copy"][::-1]
        names, colours = [row.candidate for row in ran], [COLOURS[row.role] for row in ran]
        medians = [row.median * 1e3 for row in ran]
        low = [(row.median - row.q1) * 1e3 for row in ran]
        high = [(row.q3 - row.median) * 1e3 for row in ran]
        left.barh(names, medians, xerr=[low, high], color=colours, capsize=3)
        left.set(title=f"{result.axes} = {tables.size(rows[0])}", xlabel=f"{report.clock}, ms (median, quartiles)")
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
    figure.suptitle(f"{result.benchmark}, {result.modes[mode]}\n{report.folder}, {result.dtype}{notes}", fontsize=11)
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
    for result in report.results:
        for mode in dict.fromkeys(row.mode for row in result.rows):
            made.append(path.with_name(f"{path.stem}-{result.benchmark}-{mode}.png"))
            records.write_atomically(made[-1], plot(report, result, mode))
    return made


OPENING, CLOSING = "<!-- benchmark:{} -->", "<!-- /benchmark -->"


def updated(text: str, bodies: Mapping[str, str]) -> str:
    """`text` with each body between its markers, and all else as it was. Doing it twice changes nothing.

    Benchmarks without markers are left out, and blocks of other benchmarks left alone; that no block is found at all is
    an error.
    """
    hits = 0
    for name, body in bodies.items():
        opening = OPENING.format(name)
        pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(CLOSING)}", re.DOTALL)
        found = len(pattern.findall(text))
        if found > 1 or found < text.count(opening):
            raise ValueError(f"expected one block of {opening} ... {CLOSING}, found {found}")
        hits += found
        text = pattern.sub(lambda _, new=f"{opening}\n{body}\n{CLOSING}": new, text)
    if not hits:
        raise ValueError(f"expected one block of {OPENING.format(next(iter(bodies), 'NAME'))} ... {CLOSING}, found 0")
    return text


def update_readme(readme: Path, path: Path) -> None:
    report = records.load(path)
    put(readme, path, lambda name: {r.benchmark: summary(report, r, name) for r in report.results if r.rows})


def put(readme: Path, path: Path, summaries: Callable[[str], Mapping[str, str]]) -> None:
    """Summaries between their markers, from the name of a report as seen from there; other blocks stay as they are."""
    whole, parent = path.resolve(), readme.resolve().parent
    name = whole.relative_to(parent).as_posix() if whole.is_relative_to(parent) else path.name
    try:
        text = updated(readme.read_text(encoding="utf-8"), summaries(name))
    except OSError as error:
        raise ValueError(f"{readme}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from None
    records.write_atomically(readme, text.encode())


def run(
    files: Sequence[Path],
    readme: Path | None,
    render_file: Callable[[Path], Iterable[Path]],
    update: Callable[[Path, Path], None],
) -> None:
    """Tables and plots of each file; with `readme`, the summary of one file there too."""
    if readme is not None and len(files) > 1:
        raise click.UsageError("--readme takes its numbers from one FILE; give one.")
    try:
        for path in files:
            for made in render_file(path):
                click.echo(f"wrote {made}")
        if readme is not None:
            update(readme, files[0])
            click.echo(f"updated {readme}")
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options.FILES
@options.readme_option("each summary between <!-- benchmark:NAME -->")
def command(files: tuple[Path, ...], readme: Path | None) -> None:
    """Make the Markdown table and the plots of each FILE, beside it. Numbers come from the file alone.

    \b
    python -m benchmarks.render benchmarks/results/cpu-2-cores/*.json
    python -m benchmarks.render benchmarks/results/cpu-2-cores/RUN.json --readme README.md
    """
    run(files, readme, render, update_readme)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        command.main(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
