"""docs/results.md: the table, the curves and the commands, from the runs' own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.learning.running import Finished, Job, finished, rows_of
from benchmarks.learning.tasks import Bar, Rows, Task, ends
from onecard.reporting.plots import COLOURS, FAINT, png

NONE = "–"
COLUMNS = 4  # panels in a row of the picture
PACKAGES = ("python", "torch", "transformers")
INTRODUCTION = """\
Every training command on a small pretrained model and small real data: a number on held-out rows before and after, and
the bar that `make test-long` holds it to. `python -m benchmarks.learning` makes the runs, this page and the picture;
nothing here is typed. The data lies beside the repository in `../shared/data`; what is made from it by
[benchmarks/learning/data.py](../benchmarks/learning/data.py) goes to `runs/results-data`.

Numbers are means over seeds, with the smallest and the largest; a bar is met if every seed meets it. These models are
of a size at which a run takes a minute on one processor: the table says that the algorithms work, not how good a model
of use gets. Settings and bars were chosen after trial runs on the same rows."""


@dataclass(frozen=True)
class Run:
    """A finished run with its metrics, and those of the run that it is compared with."""

    seed: int
    record: Finished
    rows: Rows
    other: Rows


@dataclass(frozen=True)
class Found:
    """A task and what there is of it; `command` is seed 1's."""

    task: Task
    command: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Verdict:
    """What came out of a bar: a number for each seed, and whether all are on the right side."""

    bar: Bar
    values: tuple[float, ...]
    met: bool


def found_of(jobs: Mapping[str, Sequence[Job]]) -> list[Found]:
    """What is there of each task; a run whose comparison is missing does not count."""
    found = []
    for name, own in jobs.items():
        task = own[0].task
        others = jobs[task.against] if task.against else own
        runs = []
        for job, other in zip(own, others, strict=True):
            record = finished(job)
            if record is not None and finished(other) is not None:
                runs.append(Run(job.seed, record, rows_of(job), rows_of(other)))
        found.append(Found(jobs[name][0].task, own[0].command, tuple(runs)))
    return found


def verdicts(found: Found) -> list[Verdict]:
    """Each bar of a task, held against all of its runs."""
    results = []
    for bar in found.task.bars:
        values = tuple(bar.value(run.rows, run.other) for run in found.runs)
        results.append(Verdict(bar, values, bar.met(values)))
    return results


def number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def spread(values: Sequence[float]) -> str:
    """The mean, and the range where there are several.

    >>> spread([1.0, 2.0, 6.0])
    '3.00 (1.00..6.00)'
    """
    mean = number(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))}..{number(max(values))})"


def bar_cell(verdict: Verdict) -> str:
    bar = verdict.bar
    side = "at most" if bar.at_most else "at least"
    came = spread(verdict.values) if verdict.values else NONE
    return f"{bar.name} {side} {bar.limit:g}: {came}"


def met_cell(judged: Sequence[Verdict]) -> str:
    """One word for each bar."""
    return "<br>".join(NONE if not verdict.values else "yes" if verdict.met else "**no**" for verdict in judged)


def table(found: Sequence[Found]) -> list[str]:
    lines = [
        "| task | model; data | what is measured | seeds | before | after | bar, for every seed | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        task, judged = each.task, verdicts(each)
        edges = [ends(run.rows, task.metric) for run in each.runs]
        before, after = [spread([edge[end] for edge in edges]) if edges else NONE for end in (0, 1)]
        cells = [
            f"`{task.name}`: {task.title}",
            f"{task.model}; {task.data}",
            task.unit,
            str(len(each.runs)) if each.runs else "not run",
            before,
            after,
            "<br>".join(bar_cell(verdict) for verdict in judged),
            met_cell(judged),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def notes(found: Sequence[Found]) -> list[str]:
    """What is to be known of tasks, each said once."""
    told: dict[str, list[str]] = {}
    for each in found:
        if each.task.note:
            told.setdefault(each.task.note, []).append(f"`{each.task.name}`")
    return [f"- {', '.join(names)}: {note}" for note, names in told.items()]


def commands(found: Sequence[Found]) -> list[str]:
    lines = []
    for each in found:
        task = each.task
        lines += ["<details>", f"<summary>{task.name}: {task.title}</summary>", ""]
        lines += ["```bash", each.command, "```", "", "</details>"]
    return lines


def sources(found: Sequence[Found]) -> str:
    """Where the numbers come from: one clause for each commit that any of them has, and what the runs took."""
    finished_runs = [run.record for each in found for run in each.runs]
    if not finished_runs:
        return "Nothing has been run yet."
    commits = {f"{record.commit[:12]}{' with changes' if record.dirty else ''}" for record in finished_runs}
    versions = {", ".join(f"{name} {record.versions[name]}" for name in PACKAGES) for record in finished_runs}
    machines = {record.processor for record in finished_runs}
    cpu = sum(record.cpu_seconds for record in finished_runs) / 60
    wall = sum(record.wall_seconds for record in finished_runs) / 60
    dates = sorted(record.date for record in finished_runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{len(finished_runs)} runs, {when}; commit {' and '.join(sorted(commits))}; {'; '.join(sorted(versions))}; "
        f"{'; '.join(sorted(machines))}, one thread each. They took {cpu:.0f} minutes of processor time, {wall:.0f} "
        "minutes on the clock one after the other."
    )


def page(found: Sequence[Found], picture: str) -> str:
    judged = [verdict for each in found for verdict in verdicts(each) if verdict.values]
    met = sum(verdict.met for verdict in judged)
    return "\n".join(
        [
            "# Does it learn?",
            "",
            INTRODUCTION,
            "",
            sources(found),
            "",
            f"Bars met: {met} of the {len(judged)} that were tried.",
            "",
            *table(found),
            "",
            *notes(found),
            "",
            f"![Held-out curves of all tasks, a line for each seed]({picture})",
            "",
            "## The commands",
            "",
            "As they were run for seed 1, from the repository's root; the others differ in `--seed` and the folder.",
            "",
            *commands(found),
            "",
        ]
    )


def curves(found: Sequence[Found]) -> Any:
    """One panel for each task that has runs: the evaluations of each seed. Panels of one metric have the same axis."""
    from matplotlib.figure import Figure

    shown = [each for each in found if each.runs]
    alike: dict[str, Any] = {}
    count = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.7 * count), layout="constrained", facecolor="white")
    axes = figure.subplots(count, COLUMNS, squeeze=False).flat
    for axis, each in zip(axes, shown, strict=False):
        first = alike.setdefault(each.task.metric, axis)
        if first is not axis:
            axis.sharey(first)
        for run, colour in zip(each.runs, COLOURS * len(each.runs), strict=False):
            points = [(row["step"], row[each.task.metric]) for row in run.rows if each.task.metric in row]
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=colour, marker="o", markersize=3, linewidth=1.3, label=f"seed {run.seed}")
        axis.set_title(each.task.name, loc="left", fontsize=10, fontweight="bold")
        axis.set_ylabel(each.task.metric.removeprefix("eval_"), fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8, length=0)
        axis.grid(color=FAINT, linewidth=0.7)
        for side in axis.spines.values():
            side.set_visible(False)
    for axis in list(figure.axes)[len(shown) :]:
        axis.set_visible(False)
    if shown:
        figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def write_page(path: Path, found: Sequence[Found]) -> list[Path]:
    """The page, and its picture beside it where there is any run."""
    picture = path.with_name(f"{path.stem}-curves.png")
    written = [path]
    if any(each.runs for each in found):
        records.write_atomically(picture, png(curves(found)))
        written.append(picture)
    records.write_atomically(path, page(found, picture.name).encode())
    return written
