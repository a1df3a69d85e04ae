"""`python -m docs.examples.learning`: trains a small real model with every training command and writes docs/results.md.

A task is an `onecard` command, a metric of its held-out rows, and bars that every seed has to meet. Runs go to
`runs/results`; the page and its picture are made from their `metrics.jsonl` alone.
"""

from __future__ import annotations

import csv
import json
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks import cli, measure, records
from benchmarks.cli import Refused
from onecard.reporting import plots

# --- data. Paths are relative to the repository's root, where every run starts: commands read the same on any machine.

SHARED = "../shared/data"
MODEL = "TinyStories-656K"
LLAMA = f"{SHARED}/models/{MODEL}"
STORIES, POLITENESS = f"{SHARED}/text/tinystories.jsonl", f"{SHARED}/prefs/rasbt_politeness.jsonl"
MADE = "runs/results-data"
JOY, LABELLED = f"{MADE}/joy.jsonl", f"{MADE}/labelled.jsonl"
SST2 = {"train": f"{MADE}/sst2-train.jsonl", "dev": f"{MADE}/sst2-dev.jsonl"}


def make_data() -> None:
    """Write all derived data; the rows are the same every time."""
    root, rows = records.ROOT, dict[str, list[dict[str, Any]]]()
    (root / MADE).mkdir(parents=True, exist_ok=True)
    # Beginnings of stories, by the example of docs/ppo.md
    joy = runpy.run_path(str(root / "docs" / "examples" / "joy.py"))
    joy["data"](str(root / STORIES), str(root / JOY))
    # One answer of each pair with its label, the chosen and the rejected one alternately
    pairs = [json.loads(line) for line in (root / POLITENESS).read_text(encoding="utf-8").splitlines()]
    rows[LABELLED] = [
        {"prompt": pair["prompt"], "completion": pair["rejected" if i % 2 else "chosen"], "label": not i % 2}
        for i, pair in enumerate(pairs)
    ]
    for part, name in SST2.items():  # sentences with score 1 (positive) or 0
        source = root / SHARED / "sentiment" / f"openai_{part}_binary_sent.csv"
        with open(source, encoding="utf-8", newline="") as file:
            rows[name] = [
                {"prompt": "Review: ", "completion": row["sentence"], "score": float(row["label"])}
                for row in csv.DictReader(file)
            ]
    for name, found in rows.items():
        records.write_atomically(root / name, "".join(json.dumps(row) + "\n" for row in found).encode())


# --- tasks

Rows = Sequence[Mapping[str, float]]  # a run's metrics.jsonl
Value = Callable[[Rows, Rows], float]  # of a run, and of the run with the same seed that it is compared with
SCORE, KL, VIOLATIONS = "eval_objective/scores", "eval_objective/kl", "eval_constraint/violation_rate"


@dataclass(frozen=True)
class Bar:
    """A number of a run that has to be at least, or at most, `limit` for every seed."""

    name: str
    value: Value
    limit: float
    at_most: bool = False

    def met(self, values: Sequence[float]) -> bool:
        """False for no values, and for NaN."""
        return bool(values) and all(v <= self.limit if self.at_most else v >= self.limit for v in values)


@dataclass(frozen=True)
class Task:
    """`arguments` are those of `onecard`, without the seed and the run folder."""

    name: str
    title: str
    data: str
    arguments: tuple[str, ...]
    metric: str  # of the evaluations: the first is before training, the last after
    unit: str  # what the metric is, in words
    bars: tuple[Bar, ...]
    against: str = ""  # another task that bars compare with
    note: str = ""
    most_seeds: int | None = None  # of tasks that take long


def before_and_after(rows: Rows, metric: str) -> tuple[float, float]:
    """A metric before and after training; KeyError without two evaluations of it."""
    found = [row[metric] for row in rows if metric in row]
    if len(found) < 2:
        raise KeyError(f"{metric} stands in {len(found)} rows, expected it before and after training")
    return found[0], found[-1]


def after(metric: str) -> Value:
    return lambda rows, other: before_and_after(rows, metric)[1]


def deviations(rows: Rows, other: Rows) -> float:
    """Rise of the mean score, in standard deviations of the starting policy's scores."""
    first, last = before_and_after(rows, SCORE)
    return (last - first) / before_and_after(rows, "eval_objective/scores_std")[0]


def ratio(metric: str) -> Value:
    """The metric after training over the same of the run that is compared with."""
    return lambda rows, other: before_and_after(rows, metric)[1] / before_and_after(other, metric)[1]


def drop_of_the_loss(rows: Rows, other: Rows) -> float:
    first, last = before_and_after(rows, "eval_loss")
    return first - last


def over_the_majority(rows: Rows, other: Rows) -> float:
    labels, majority = (before_and_after(rows, f"eval_{name}")[1] for name in ("label_accuracy", "majority_class"))
    return labels - majority


ON_A_CPU = " --no_padding_free --save_steps 0"  # packed, each of these short texts would be an attention call


def task(name: str, title: str, data: str, command: str, metric: str, unit: str, *bars: Bar, **more: Any) -> Task:
    return Task(name, title, data, tuple((command + ON_A_CPU).split()), metric, unit, bars, **more)


JOYFUL = (
    f"ppo --model {LLAMA} --dataset {JOY} --test_size 128 --response_length 48 --eval_steps 4 "
    "--per_device_train_batch_size 16 --reward_funcs docs/examples/joy.py:joy "
)
ESTIMATORS = {
    "gae": ("PPO (GAE, a critic)", "--learning_rate 1.5e-3 --max_steps 12"),
    "rloo": ("RLOO", "--num_generations 4 --learning_rate 1.5e-3 --max_steps 12"),
    "grpo": ("GRPO", "--num_generations 4 --learning_rate 1.5e-3 --max_steps 12"),
    "reinforce": ("REINFORCE", "--learning_rate 3e-3 --max_steps 24 --kl_coef 0.2"),
    "a2c": ("A2C", "--learning_rate 3e-3 --max_steps 24 --kl_coef 0.2"),
}


def gained(limit: float) -> Bar:
    return Bar("standard deviations gained", deviations, limit)


def fewer_violations(share: float) -> tuple[Bar, ...]:
    """Bars of a constrained run, which has to raise its reward too."""
    violations = Bar("violations, over those of the run that only counts them", ratio(VIOLATIONS), share, at_most=True)
    return violations, gained(0.5)


# Words of joy are rewarded and one of them is forbidden: without a constraint it becomes frequent.
CONSTRAINTS: dict[str, tuple[str, str, tuple[Bar, ...]]] = {
    "counted": (
        "PPO, violations counted and not penalized",
        "--constraint_mode lagrangian --constraint_lambda 0 --constraint_lambda_lr 0",
        (gained(1.5),),
    ),
    "skip": ("constrained PPO, skip", "--constraint_mode skip", fewer_violations(0.75)),
    "lagrangian": (
        "constrained PPO, lagrangian",
        "--constraint_mode lagrangian --constraint_lambda 2 --constraint_lambda_lr 0.5",
        fewer_violations(0.5),
    ),
}
PREFERENCES = {
    "sigmoid": ("DPO", POLITENESS, "--learning_rate 1e-3"),
    "ipo": ("IPO", POLITENESS, "--loss_type ipo --beta 1 --learning_rate 1e-3"),
    "simpo": ("SimPO", POLITENESS, "--loss_type simpo --beta 2 --simpo_gamma 1 --learning_rate 2e-3"),
    "kto": ("KTO", LABELLED, "--loss_type kto --learning_rate 1e-3"),
}


def constrained(kind: str) -> Task:
    title, settings, bars = CONSTRAINTS[kind]
    return task(
        f"constraint-{kind}",
        f"{title}: no 'happy'",
        "beginnings of tinystories",
        f"{JOYFUL} --learning_rate 1.5e-3 --max_steps 12 --constraint_funcs regex:(?i)happ --constraint_threshold 0 "
        f"{settings}",
        VIOLATIONS,
        "answers with 'happ' in them",
        *bars,
        against="" if kind == "counted" else "constraint-counted",
    )


def preferred(loss: str) -> Task:
    """KTO has no pairs: its bar is the difference of the mean rewards of good and bad answers."""
    title, data, settings = PREFERENCES[loss]
    pairs = loss != "kto"
    metric = "eval_rewards/accuracies" if pairs else "eval_rewards/margins"
    note = "Before the first step the policy is the reference: all rewards are 0, and so is the first number."
    return task(
        f"dpo-{loss}",
        title,
        "politeness" if pairs else "politeness, every second answer",
        f"dpo --model {LLAMA} --dataset {data} --test_size 200 --num_train_epochs 2 --eval_steps 28 "
        f"--per_device_train_batch_size 16 --per_device_eval_batch_size 32 {settings}",
        metric,
        "held-out pairs in the right order" if pairs else "mean reward of good held-out answers minus that of bad",
        Bar("pairs in the right order", after(metric), 0.75) if pairs else Bar("margin", after(metric), 0.5),
        note="" if loss == "simpo" else note,
    )


TASKS: dict[str, Task] = {
    each.name: each
    for each in (
        task(
            "sft",
            "SFT of all weights",
            "tinystories",
            f"sft --model {LLAMA} --dataset {STORIES} --test_size 0.2 --no_use_peft --learning_rate 3e-4 "
            "--num_train_epochs 3 --eval_steps 10",
            "eval_loss",
            "held-out loss, nats per token",
            Bar("drop of the loss", drop_of_the_loss, 0.15),
        ),
        task(
            "reward-pairs",
            "reward adapter from pairs",
            "politeness",
            f"reward --model {LLAMA} --dataset {POLITENESS} --test_size 200 --learning_rate 2e-3 --num_train_epochs 3 "
            "--per_device_train_batch_size 32 --eval_steps 28",
            "eval_accuracy",
            "held-out pairs in the right order",
            Bar("pairs in the right order", after("eval_accuracy"), 0.8),
        ),
        task(
            "reward-scores",
            "reward adapter from scores",
            "SST-2",
            f"reward --model {LLAMA} --dataset {SST2['train']} --eval_dataset {SST2['dev']} --score_activation sigmoid "
            "--learning_rate 2e-3 --num_train_epochs 2 --per_device_train_batch_size 32 --eval_steps 108 "
            "--per_device_eval_batch_size 64",
            "eval_accuracy",
            "share of (positive, negative) held-out sentences in the right order",
            Bar("in the right order", after("eval_accuracy"), 0.7),
            Bar("correlation with the labels", after("eval_pearson"), 0.35),
            Bar("accuracy over the majority class's", over_the_majority, 0.1),
            note="A constant score, such as the majority class's, orders no pair; random scores order half of them. "
            "One seed, because a run takes two minutes.",
            most_seeds=1,
        ),
        *(
            task(
                f"ppo-{estimator}",
                f"{title} towards words of joy",
                "beginnings of tinystories",
                f"{JOYFUL} --advantage_estimator {estimator} {settings}",
                SCORE,
                "words of joy in an answer",
                gained(1.5),
                Bar("nats of KL per answer", after(KL), 25, at_most=True),
            )
            for estimator, (title, settings) in ESTIMATORS.items()
        ),
        *map(constrained, CONSTRAINTS),
        *map(preferred, PREFERENCES),
    )
}


# --- runs

RECORD = "learning.json"
PAGE = records.ROOT / "docs" / "results.md"
RUNS = Path("runs/results")


@dataclass(frozen=True)
class Job:
    """One task with one seed; `output` is the folder of all runs."""

    task: Task
    seed: int
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / f"{self.task.name}-{self.seed}"

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.task.arguments, "--seed", str(self.seed), "--output_dir", str(self.folder))

    @property
    def command(self) -> str:
        return shlex.join(("onecard", *self.arguments))


def jobs_of(output: Path, seeds: int) -> dict[str, list[Job]]:
    """Seeds 1 to `seeds` of each task, or as many as it takes."""
    return {
        name: [Job(task, seed, output) for seed in range(1, min(seeds, task.most_seeds or seeds) + 1)]
        for name, task in TASKS.items()
    }


@dataclass(frozen=True)
class Finished:
    """A finished run's `learning.json`: its command, and the code and machine that its numbers came from."""

    command: str
    commit: str
    dirty: bool
    versions: dict[str, str]
    processor: str
    date: str
    wall_seconds: float
    cpu_seconds: float


def finished(job: Job) -> Finished | None:
    """The record of a run that ended under this command; None where there is none."""
    try:
        record = Finished(**json.loads((job.folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.command == job.command and (job.folder / "metrics.jsonl").is_file() else None


def metrics_of(job: Job) -> Rows:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run(job: Job, origin: Mapping[str, Any]) -> str:
    """Run one job and write its record; returns "", or why it failed."""
    name, log = job.folder.name, job.output / f"{job.folder.name}.log"
    (job.folder / RECORD).unlink(missing_ok=True)
    job.output.mkdir(parents=True, exist_ok=True)
    sources = [str(records.ROOT / part) for part in ("engine", "kernels")] + [os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sources))}
    command = [sys.executable, "-m", "onecard", *job.arguments, "--overwrite"]
    code, seconds, usage = measure.run_process(command, log, own)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{name}: exit status {code}: {lines[-1] if lines else 'no output'} ({log})"
    cpu = usage.ru_utime + usage.ru_stime
    record = Finished(
        job.command, **origin, date=records.now(), wall_seconds=round(seconds, 1), cpu_seconds=round(cpu, 1)
    )
    records.write_atomically(job.folder / RECORD, (json.dumps(asdict(record), indent=1) + "\n").encode())
    return ""


def run_all(jobs: Sequence[Job], at_a_time: int) -> list[str]:
    """Run what is not finished yet; returns the reason of each failure."""
    head, dirty = records.commit()
    origin = {"commit": head, "dirty": dirty, "versions": records.versions(), "processor": records.processor()}
    waiting = [job for job in jobs if finished(job) is None]
    if waiting:
        make_data()
    failures: list[str] = []
    with ThreadPoolExecutor(at_a_time) as pool:
        futures = {pool.submit(run, job, origin): job for job in waiting}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                failures += filter(None, [future.result()])
                click.echo(f"{done} of {len(waiting)}: {futures[future].folder.name}", err=True)
        finally:  # Ctrl-C ends the runs too
            pool.shutdown(cancel_futures=True)
    return failures


# --- the page

NONE = "–"
COLUMNS = 4  # panels in a row of the picture
PACKAGES = ("python", "torch", "transformers")
INTRODUCTION = """\
Every training command on a small pretrained model and small real data: a number on held-out rows before and after
training, and its bar, the value that it must reach in `make test-long`. `python -m docs.examples.learning` makes the
runs, this page and the picture; no number here is typed by hand. The data is in `../shared/data`, beside the
repository; what [examples/learning.py](examples/learning.py) makes from it goes to `runs/results-data`.

Numbers are means over seeds, with the smallest and the largest; a bar is met if every seed meets it. The models are so
small that a run takes a minute on one processor core. The table shows that the algorithms work, not how good a larger
model would get. Settings and bars were chosen after trial runs on the same rows."""


class Run(NamedTuple):
    """A finished run with its metrics, and those of the run that it is compared with."""

    seed: int
    record: Finished
    rows: Rows
    other: Rows


class Found(NamedTuple):
    """A task and its finished runs; `command` is seed 1's."""

    task: Task
    command: str
    runs: list[Run]


def found_of(jobs: Mapping[str, Sequence[Job]]) -> list[Found]:
    """The finished runs of each task; a run whose comparison is missing does not count."""
    found = []
    for own in jobs.values():
        others = jobs[own[0].task.against] if own[0].task.against else own
        runs = [
            Run(job.seed, record, metrics_of(job), metrics_of(other))
            for job, other in zip(own, others, strict=True)
            if (record := finished(job)) and finished(other)
        ]
        found.append(Found(own[0].task, own[0].command, runs))
    return found


def verdicts(found: Found) -> list[tuple[Bar, list[float]]]:
    """Each bar with a number for each seed."""
    return [(bar, [bar.value(run.rows, run.other) for run in found.runs]) for bar in found.task.bars]


def number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def spread(values: Sequence[float]) -> str:
    """The mean, and the range of several values."""
    mean = number(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))}..{number(max(values))})"


def bar_cell(bar: Bar, values: Sequence[float]) -> str:
    shown = spread(values) if values else NONE
    return f"{bar.name} {'at most' if bar.at_most else 'at least'} {bar.limit:g}: {shown}"


def table(found: Sequence[Found]) -> list[str]:
    lines = [
        "| task | model; data | what is measured | seeds | before | after | bar, for every seed | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        task, judged = each.task, verdicts(each)
        edges = [before_and_after(run.rows, task.metric) for run in each.runs]
        before, after = [spread([edge[end] for edge in edges]) if edges else NONE for end in (0, 1)]
        cells = [
            f"`{task.name}`: {task.title}",
            f"{MODEL}; {task.data}",
            task.unit,
            str(len(each.runs)) if each.runs else "not run",
            before,
            after,
            "<br>".join(bar_cell(bar, values) for bar, values in judged),
            "<br>".join(NONE if not values else "yes" if bar.met(values) else "**no**" for bar, values in judged),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sources(found: Sequence[Found]) -> str:
    """Commits, versions, machines and times of the runs."""
    runs = [run.record for each in found for run in each.runs]
    if not runs:
        return "Nothing has been run yet."
    commits = {f"{run.commit[:12]}{' with changes' if run.dirty else ''}" for run in runs}
    versions = {", ".join(f"{name} {run.versions[name]}" for name in PACKAGES) for run in runs}
    machines = {run.processor for run in runs}
    dates = sorted({run.date for run in runs})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    cpu, wall = sum(run.cpu_seconds for run in runs) / 60, sum(run.wall_seconds for run in runs) / 60
    return (
        f"{len(runs)} runs, {when}; commit {' and '.join(sorted(commits))}; {'; '.join(sorted(versions))}; "
        f"{'; '.join(sorted(machines))}, one thread each. They took {cpu:.0f} minutes of processor "
        f"time; their wall times add up to {wall:.0f} minutes."
    )


def page(found: Sequence[Found], picture: str) -> str:
    judged = [bar.met(values) for each in found for bar, values in verdicts(each) if values]
    notes: dict[str, list[str]] = {}  # each once, with the tasks that have it
    for each in found:
        if each.task.note:
            notes.setdefault(each.task.note, []).append(f"`{each.task.name}`")
    commands = [
        f"<details>\n<summary>{each.task.name}: {each.task.title}</summary>\n\n"
        f"```bash\n{each.command}\n```\n\n</details>"
        for each in found
    ]
    parts = [
        "# Does it learn?",
        INTRODUCTION,
        sources(found),
        f"Bars met: {sum(judged)} of the {len(judged)} with finished runs.",
        "\n".join(table(found)),
        "\n".join(f"- {', '.join(tasks)}: {note}" for note, tasks in notes.items()),
        f"![Held-out curves of all tasks, a line for each seed]({picture})",
        "## The commands",
        "As run with seed 1, from the repository's root; runs with other seeds differ in `--seed` and `--output_dir`.",
        "\n".join(commands),
    ]
    return "\n\n".join(parts) + "\n"


def panel(found: Found) -> plots.Panel:
    """The evaluations of each seed."""
    metric = found.task.metric
    rows = [
        {"step": row["step"], f"eval_seed {run.seed}": row[metric]}
        for run in found.runs
        for row in run.rows
        if metric in row
    ]
    names = tuple(f"seed {run.seed}" for run in found.runs)
    return plots.Panel(rows, names, found.task.name, metric.removeprefix("eval_"))


def write_page(path: Path, found: Sequence[Found]) -> list[Path]:
    """The page, and its picture beside it where there is any run."""
    picture = path.with_name(f"{path.stem}-curves.png")
    written = [path]
    panels = [panel(each) for each in found if each.runs]
    if panels:
        rows = [panels[first : first + COLUMNS] for first in range(0, len(panels), COLUMNS)]
        records.write_atomically(picture, plots.png(plots.grid(rows)))
        written.append(picture)
    records.write_atomically(path, page(found, picture.name).encode())
    return written


@click.command(context_settings=cli.SETTINGS)
@click.option("--only", multiple=True, type=click.Choice(list(TASKS)), help="A task; several times. Default: all.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Seeds 1 to N of each task.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(min=1), help="Runs at a time.")
@click.option("--render", is_flag=True, help="Write the page from the finished runs; run nothing.")
def command(only: tuple[str, ...], seeds: int, jobs: int, render: bool) -> None:
    """Run each task of the table through the `onecard` command line, and write docs/results.md with the results.

    A finished run is kept until its command changes or its folder is removed; a change of the code does not make it
    again. The page has all tasks. The exit status is 1 if a run fails.

    \b
    python -m docs.examples.learning                             all of it (a quarter of an hour on two idle cores)
    python -m docs.examples.learning --only sft --seeds 1        one run
    python -m docs.examples.learning --render                    the page again
    """
    all_jobs = jobs_of(RUNS, seeds)
    failures: list[str] = []
    if not render:
        if not (records.ROOT / SHARED).is_dir():
            raise click.UsageError(f"needs models and data in {SHARED} beside the repository, which is not there.")
        wanted = {name for name in TASKS if not only or name in only}
        wanted |= {TASKS[name].against for name in wanted} - {""}
        failures = run_all([job for name in TASKS if name in wanted for job in all_jobs[name]], jobs)
    for path in write_page(PAGE, found_of(all_jobs)):
        click.echo(f"wrote {path}")
    if failures:
        raise Refused("; ".join(failures))


if __name__ == "__main__":
    sys.exit(cli.main(command))
