"""The learning table: its commands are commands, its bars judge, its page says what the runs' files say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.learning import data, page, running
from benchmarks.learning.page import bar_cell, found_of, met_cell, spread, table, verdicts
from benchmarks.learning.running import RECORD, Finished, Flight, Job, finished, rows_of, run_all
from benchmarks.learning.tasks import KL, SCORE, TASKS, VIOLATIONS, Bar, after, deviations, ratio
from onecard.commands.cli import COMMANDS, make_cli

RESULTS = records.ROOT / "docs" / "results.md"


def record(job: Job, **changes: object) -> Finished:
    made = Finished(
        command=job.command, commit="c0ffee" * 7, dirty=False, versions={name: "1.2" for name in page.PACKAGES},
        processor="a processor", date="2026-01-01T00:00Z", wall_seconds=90.0, cpu_seconds=60.0,
    )  # fmt: skip
    return replace(made, **changes)


def leave(job: Job, *rows: dict[str, float]) -> None:
    """A run's folder as a finished run leaves it."""
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job.folder / RECORD).write_text(json.dumps(asdict(record(job))))


def made_jobs(output: Path, *names: str, seeds: int = 2) -> dict[str, list[Job]]:
    return {name: [Job(TASKS[name], seed, output) for seed in range(1, seeds + 1)] for name in names}


@pytest.mark.parametrize("name", list(TASKS))
def test_every_command_parses(name, monkeypatch):
    job = Job(TASKS[name], 1, Path("runs/results"))
    command, *flags = job.arguments
    context = make_cli().commands[command].make_context(command, flags)  # a UsageError for a flag that is none
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in context.params.items()}
    config = COMMANDS[command][0](**values)
    assert (config.seed, config.output_dir) == (1, f"runs/results/{name}-1")
    assert shlex.split(job.command) == ["onecard", *job.arguments]
    if command == "ppo":
        config.validate()
        for entry in config.constraint_funcs:
            assert re.search(entry.removeprefix("regex:"), "So Happy")
        (function,) = config.reward_funcs
        assert (records.ROOT / function.split(":")[0]).is_file()


def test_what_is_compared_differs_in_the_constraint_alone():
    """Bars of the constrained runs are about the run without: the same reward, weight and length."""
    plain = TASKS["constraint-counted"].arguments
    shared = plain[: plain.index("--constraint_mode")]
    for name in ("constraint-skip", "constraint-lagrangian"):
        assert TASKS[name].against == "constraint-counted"
        assert TASKS[name].arguments[: len(shared)] == shared


def test_a_task_has_as_many_seeds_as_it_takes():
    jobs = running.jobs_of(Path("x"), 3)
    assert list(jobs) == list(TASKS)
    assert [job.seed for job in jobs["sft"]] == [1, 2, 3]
    assert [job.seed for job in jobs["reward-scores"]] == [1]
    assert [job.folder for job in jobs["sft"][:1]] == [Path("x/sft-1")]


def test_bars_are_for_every_seed():
    least, most = Bar("", after("x"), 0.5), Bar("", after("x"), 0.5, at_most=True)
    assert least.met([0.5, 0.9])
    assert not least.met([0.49, 0.9])
    assert most.met([0.1, 0.5])
    assert not most.met([0.1, 0.51])
    for bar in (least, most):
        assert not bar.met([])
        assert not bar.met([0.5, float("nan")])


def test_the_values_of_bars_by_hand():
    rows = [
        {"step": 0, SCORE: 1.0, "eval_objective/scores_std": 0.5, KL: 0.0, VIOLATIONS: 0.3},
        {"step": 1, "objective/scores": 9.0},
        {"step": 2, SCORE: 3.0, "eval_objective/scores_std": 4.0, KL: 7.0, VIOLATIONS: 0.2},
    ]
    other = [{VIOLATIONS: 0.1}, {VIOLATIONS: 0.8}]
    assert deviations(rows, []) == (3.0 - 1.0) / 0.5
    assert after(KL)(rows, []) == 7.0
    assert ratio(VIOLATIONS)(rows, other) == pytest.approx(0.2 / 0.8)
    (drop,) = TASKS["sft"].bars
    assert drop.value([{"eval_loss": 3.0}, {"eval_loss": 2.5}, {"eval_loss": 2.0}], []) == 1.0
    with pytest.raises(KeyError, match="1 rows"):
        after("eval_loss")([{"eval_loss": 3.0}], [])


def test_a_number_is_the_mean_with_the_range():
    assert spread([1.0, 2.0, 6.0]) == "3.00 (1.00..6.00)"
    assert spread([0.125]) == "0.12"


def test_the_page_says_what_the_runs_say(tmp_path):
    jobs = made_jobs(tmp_path, "sft", "reward-pairs", "constraint-counted", "constraint-skip")
    for job, (first, last) in zip(jobs["sft"], ((3.0, 2.5), (3.2, 2.9)), strict=True):
        leave(job, {"step": 0, "eval_loss": first}, {"step": 5, "loss": 1.0}, {"step": 9, "eval_loss": last})
    for job, last in zip(jobs["reward-pairs"], (0.9, 0.7), strict=True):
        leave(job, {"step": 0, "eval_accuracy": 0.5}, {"step": 9, "eval_accuracy": last})
    leave(jobs["constraint-skip"][0], {"step": 0, VIOLATIONS: 0.2}, {"step": 9, VIOLATIONS: 0.1})
    found = found_of(jobs)
    _, _, sft, pairs, counted, skip = (line.split(" | ") for line in table(found))
    assert sft[3:6] == ["2", "3.10 (3.00..3.20)", "2.70 (2.50..2.90)"]
    assert sft[6:] == ["drop of the loss at least 0.15: 0.40 (0.30..0.50)", "yes |"]
    assert pairs[6:] == [
        "pairs in the right order at least 0.8: 0.80 (0.70..0.90)",
        "**no** |",
    ]  # the worst seed decides
    assert counted[3:6] == ["not run", "–", "–"]
    assert skip[3] == "not run"  # what it is compared with is missing
    written = page.write_page(tmp_path / "docs" / "results.md", found)
    assert [path.name for path in written] == ["results.md", "results-curves.png"]
    text = written[0].read_text()
    assert "4 runs" in text
    assert "4 minutes of processor time" in text
    assert "6 minutes on the clock" in text
    assert "Bars met: 1 of the 2 that were tried." in text
    assert "commit c0ffeec0ffee;" in text
    assert jobs["sft"][0].command in text
    assert written[1].read_bytes() == page.png(page.curves(found))  # no date in it


def test_a_note_is_said_once(tmp_path):
    first, second = page.notes(found_of(made_jobs(tmp_path, "sft", "dpo-sigmoid", "dpo-ipo", "reward-scores")))
    assert first == f"- `dpo-sigmoid`, `dpo-ipo`: {TASKS['dpo-ipo'].note}"
    assert second.startswith("- `reward-scores`: ")


def test_a_comparison_is_of_the_same_seed(tmp_path):
    jobs = made_jobs(tmp_path, "constraint-counted", "constraint-skip")
    for job, last in zip((*jobs["constraint-counted"], *jobs["constraint-skip"]), (0.8, 0.4, 0.2, 0.3), strict=True):
        scores = {SCORE: 1.0, "eval_objective/scores_std": 1.0}
        leave(job, {"step": 0, VIOLATIONS: 0.2, **scores}, {"step": 9, VIOLATIONS: last, **scores})
    skip, gain = verdicts(found_of(jobs)[1])
    assert gain.values == (0.0, 0.0)
    left, right = page.curves(found_of(jobs)).axes[:2]
    assert left.get_ylim() == right.get_ylim()
    assert skip.values == (0.2 / 0.8, 0.3 / 0.4)
    assert bar_cell(skip) == "violations, as a share of those without constraint at most 0.75: 0.50 (0.25..0.75)"
    assert met_cell([skip, replace(skip, met=False), replace(skip, values=())]) == "yes<br>**no**<br>–"


def test_only_a_finished_run_of_this_very_command_counts(tmp_path):
    job = Job(TASKS["sft"], 1, tmp_path)
    assert finished(job) is None
    assert rows_of(job) == ()
    leave(job, {"step": 0, "eval_loss": 1.0})
    assert finished(job) == record(job)
    assert rows_of(job) == [{"step": 0, "eval_loss": 1.0}]
    changed = Job(replace(job.task, arguments=(*job.task.arguments, "--lora_r", "2")), 1, tmp_path)
    assert finished(changed) is None
    (job.folder / RECORD).write_text("{")
    assert finished(job) is None


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr(running, "make_data", lambda: None)


def test_runs_go_so_many_at_a_time_and_finished_ones_are_kept(tmp_path, monkeypatch, no_data):
    begun: list[str] = []

    def start(job: Job) -> Flight:
        begun.append(job.folder.name)
        job.folder.mkdir(parents=True)
        (job.folder / "metrics.jsonl").write_text("{}\n")
        return Flight(
            job, subprocess.Popen([sys.executable, "-c", "sum(range(2 * 10**7))"]), tmp_path, time.monotonic()
        )

    monkeypatch.setattr(running, "start", start)
    jobs = made_jobs(tmp_path, "sft", "reward-pairs")
    kept, *rest = (job for own in jobs.values() for job in own)
    leave(kept)
    shown: list[tuple[int, int]] = []
    assert run_all([kept, *rest], 2, lambda names, done: shown.append((len(names), done))) == []
    assert begun == ["sft-2", "reward-pairs-1", "reward-pairs-2"]
    assert shown[0] == (2, 1)
    assert shown[-1] == (0, 4)
    assert max(count for count, _ in shown) == 2
    head, dirty = records.commit()
    for job in rest:
        found = finished(job)
        assert found is not None
        assert (found.commit, found.dirty) == (head, dirty)
        assert found.cpu_seconds > 0
    assert run_all([kept, *rest], 2) == []
    assert len(begun) == 3


def test_a_run_that_fails_is_named_and_takes_the_old_one_with_it(tmp_path, no_data):
    """Its folder may hold a mixture by then, which must not pass for the run that was there."""
    old = Job(TASKS["sft"], 1, tmp_path)
    leave(old)
    job = Job(replace(old.task, arguments=("sft", "--learning_rat", "1")), 1, tmp_path)
    (failure,) = run_all([job], 1)
    assert failure.startswith("sft-1: exit status 2: onecard: error:")
    assert "learning_rate" in failure
    assert finished(job) is None
    assert finished(old) is None


def test_labelled_answers_take_turns(tmp_path, politeness):
    path = tmp_path / "rows.jsonl"
    data.MAKERS[data.LABELLED](path)
    pairs = [json.loads(line) for line in politeness.read_text().splitlines()]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(pairs)
    assert rows[0] == {"prompt": pairs[0]["prompt"], "completion": pairs[0]["chosen"], "label": True}
    assert rows[1] == {"prompt": pairs[1]["prompt"], "completion": pairs[1]["rejected"], "label": False}


def test_the_page_in_docs_is_of_these_tasks():
    """After a change of tasks: `python -m benchmarks.learning --render`, and run what it then lacks."""
    text = RESULTS.read_text(encoding="utf-8")
    for task in TASKS.values():
        assert f"`{task.name}`: {task.title}" in text
        assert Job(task, 1, Path("runs/results")).command in text
