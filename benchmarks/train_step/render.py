"""`python -m benchmarks.train_step.render FILE.json...`: Markdown and plots of a run, and the README's tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks import measure, options, records, tables
from benchmarks.kernels import main as guarded
from benchmarks.render import put, run, table
from benchmarks.train_step import results
from benchmarks.train_step.memory_tables import memory_parts, memory_verdict, steps_verdict
from benchmarks.train_step.plots import PLOTS
from benchmarks.train_step.results import OURS, Report, Result, Row, title
from benchmarks.train_step.run import GEMMS, TRL, UNSHARED
from benchmarks.train_step.watch import ROLLOUT, WHOLE

NONE = tables.NONE
DPO_HEADINGS = ("", "tokens/s", "quartiles", "onecard is faster by", "of GEMM rate", "step's memory, MiB",
                "with weights, MiB")  # fmt: skip
PPO_HEADINGS = ("phase", "seconds", "share", "tokens/s", "of GEMM rate", "memory above weights, MiB")


def shown(value: measure.Spread | None, form: str) -> str:
    return NONE if value is None else format(value.median, form)


def span(value: measure.Spread | None, form: str) -> str:
    return NONE if value is None else f"{value.q1:{form}} to {value.q3:{form}}"


def factor(value: measure.Spread | None) -> str:
    return NONE if value is None else f"{value.median:.2f}x ({value.q1:.2f} to {value.q3:.2f})"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def whole_bytes(row: Row) -> int | None:
    """At once, weights and all."""
    return None if row.peak_bytes is None or row.held_bytes is None else row.peak_bytes + row.held_bytes


def dpo_lines(result: Result) -> list[list[str]]:
    """A line for each candidate."""
    ours, limit = results.named(result, OURS), results.named(result, GEMMS)
    lines = []
    for row in result.rows:
        if row.role == records.LIMIT:
            continue
        if row.reason is not None:
            lines.append([row.name, row.reason, *[""] * (len(DPO_HEADINGS) - 2)])
            continue
        rate, faster = results.rate(row), ours and results.speed_over(ours, row)
        lines.append(
            [
                row.name,
                shown(rate, ",.0f"),
                span(rate, ",.0f"),
                NONE if row is ours else factor(faster),
                share(results.utilisation(row, limit)),
                tables.mebibytes(row.peak_bytes),
                tables.mebibytes(whole_bytes(row)),
            ]
        )
    return lines


def ppo_lines(result: Result) -> list[list[str]]:
    """A line for each phase, and the whole."""
    whole, limit = results.named(result, WHOLE), results.named(result, GEMMS)
    lines = []
    for row in result.rows:
        if row.role == records.LIMIT:
            continue
        if row.reason is not None:
            lines.append([row.name, row.reason, *[""] * (len(PPO_HEADINGS) - 2)])
            continue
        counted = results.utilisation(row, limit) if sum(row.flops) else None
        part = None
        if whole is not None and whole.seconds:
            part = measure.spread([mine / all_ for mine, all_ in zip(row.seconds, whole.seconds, strict=True)])
        lines.append(
            [
                row.name,
                f"{measure.spread(row.seconds).median:.3g}",
                shown(part, ".0%"),
                shown(results.rate(row), ",.0f"),
                share(counted),
                tables.mebibytes(row.peak_bytes),
            ]
        )
    return lines


LINES = {"dpo": (DPO_HEADINGS, dpo_lines), "ppo": (PPO_HEADINGS, ppo_lines)}
ITEMS = {"dpo": "pairs", "ppo": "responses"}


def sizes(result: Result) -> str:
    """What a step is made of, in a line."""
    size, settings = result.sizes, result.settings
    lengths = f"{size['prompt']} + {size['response']} tokens{' at most, at least half' if result.mixed else ''}"
    parts = [
        f"{result.model}, {result.parameters / 1e6:,.0f}M parameters, {result.dtype}",
        f"{size['items']} {ITEMS[result.kind]} of {lengths}, {size['per_pass']} in a micro-batch",
        *(name for name, value in settings.items() if value is True),
        settings["optim"],
    ]
    if result.cap_gib:
        parts.append(f"capped at {result.cap_gib:g} GiB")
    if result.kind == "dpo" and not result.in_turns:
        parts.append("candidates one after the other")
    return "; ".join(parts)


def provenance(report: Report) -> str:
    """One line: where, when, and from which code."""
    return tables.provenance_of(report, f"median of {tables.rounds(report)} rounds, {report.clock}")


def markdown(report: Report, name: str) -> str:
    """All the rows of a run."""
    parts = [
        f"# Training steps on {report.folder}",
        provenance(report),
        f"Made from {name} by `python -m benchmarks.train_step.render`; how to read it: the README of `benchmarks/`.",
    ]
    for result in report.results:
        parts += [f"## {title(report, result)}", f"{sizes(result)}."]
        if result.refused is not None:
            parts.append(f"REFUSED, nothing is reported: {result.refused}")
            continue
        headings, lines = LINES[result.kind]
        parts += [table(headings, lines(result)), *memory_parts(result)]
    return "\n\n".join(parts) + "\n"


def brief(result: Result) -> str:
    """A few lines for the terminal."""
    head = f"{result.kind} {result.name}"
    if result.refused is not None:
        return f"{head}: REFUSED, {result.refused}"
    _, lines = LINES[result.kind]
    shown = [*lines(result), [memory_verdict(result)], [steps_verdict(result)]]
    return "\n".join([head, *("  " + " | ".join(cell for cell in line if cell) for line in shown)])


def dpo_summary(report: Report, name: str) -> str:
    """The README's table: a line per case."""
    lines = []
    for result in report.results:
        ours, plain, theirs = (results.named(result, each) for each in (OURS, UNSHARED, TRL))
        if result.kind != "dpo" or ours is None or not ours.seconds:
            continue
        memory = NONE
        if theirs is not None and theirs.peak_bytes and ours.peak_bytes:
            memory = f"{ours.peak_bytes / theirs.peak_bytes:.2f}x"
        lines.append(
            [
                title(report, result).removeprefix("DPO: "),
                shown(results.rate(ours), ",.0f"),
                NONE if theirs is None else theirs.reason or factor(results.speed_over(ours, theirs)),
                factor(plain and results.speed_over(ours, plain)),
                tables.mebibytes(whole_bytes(ours)),
                memory,
            ]
        )
    headings = ("DPO step", "tokens/s", "faster than TRL by", "of that by sharing prompts", "peak, MiB",
                "step's memory / TRL's")  # fmt: skip
    return f"{table(headings, lines)}\n\n{provenance(report)} From `{name}`."


def ppo_summary(report: Report, name: str) -> str:
    """The README's table: a line per case."""
    lines = []
    for result in report.results:
        whole, rollout = results.named(result, WHOLE), results.named(result, ROLLOUT)
        if result.kind != "ppo" or whole is None or not whole.seconds or rollout is None:
            continue
        part = measure.spread([mine / all_ for mine, all_ in zip(rollout.seconds, whole.seconds, strict=True)])
        lines.append(
            [
                title(report, result).removeprefix("PPO: "),
                shown(results.rate(rollout), ",.0f"),
                shown(part, ".0%"),
                shown(results.rate(whole), ",.0f"),
                tables.mebibytes(whole_bytes(whole)),
            ]
        )
    headings = ("PPO iteration", "rollout, tokens/s", "rollout's share", "whole, tokens/s", "peak, MiB")
    return f"{table(headings, lines)}\n\n{provenance(report)} From `{name}`."


SUMMARIES = {"train-step-dpo": dpo_summary, "train-step-ppo": ppo_summary}


def render(path: Path) -> list[Path]:
    """Writes the Markdown file and the plots beside a report."""
    report = results.load(path)
    made = [path.with_suffix(".md")]
    records.write_atomically(made[0], markdown(report, path.name).encode())
    for kind, plot in PLOTS.items():
        found = [r for r in report.results if r.kind == kind and any(row.seconds for row in r.rows)]
        if found:
            made.append(path.with_name(f"{path.stem}-{kind}.png"))
            records.write_atomically(made[-1], plot(report, found))
    return made


def update_readme(readme: Path, path: Path) -> None:
    """Put the summaries between their markers; other blocks stay as they are."""
    report = results.load(path)
    kinds = {result.kind for result in report.results}
    put(
        readme,
        path,
        lambda name: {
            block: make(report, name) for block, make in SUMMARIES.items() if block.rpartition("-")[2] in kinds
        },
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options.FILES
@options.readme_option("the summaries between <!-- benchmark:train-step-dpo --> (and -ppo)")
def command(files: tuple[Path, ...], readme: Path | None) -> None:
    """Make the Markdown table and the plots of each FILE, beside it. Numbers come from the file alone."""
    run(files, readme, render, update_readme)


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
