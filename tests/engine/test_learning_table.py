"""The learning table: its commands parse, its bars judge every seed, and docs/results.md has its tasks."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import records
from docs.examples import learning
from docs.examples.learning import KL, PACKAGES, RECORD, SCORE, TASKS, VIOLATIONS, Bar, Finished, Job, after, deviations
from onecard.commands.cli import COMMANDS, make_cli


def leave(job: Job, *rows: dict[str, float]) -> None:
    """A run's folder as a finished run leaves it."""
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Finished(
        job.command, "c0ffee" * 7, False, {name: "1.2" for name in PACKAGES}, "a processor", "2026-01-01T00:00Z", 90, 60
    )
    (job.folder / RECORD).write_text(json.dumps(asdict(made)))


@pytest.mark.parametrize("name", list(TASKS))
def test_every_command_parses(name):
    job = Job(TASKS[name], 1, Path("runs/results"))
    command, *flags = job.arguments
    context = make_cli().commands[command].make_context(command, flags)  # a UsageError for an unknown flag
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in context.params.items()}
    config = COMMANDS[command][0](**values)
    assert (config.seed, config.output_dir) == (1, f"runs/results/{name}-1")
    if command == "ppo":
        config.validate()
        for entry in config.constraint_funcs:
            assert re.search(entry.removeprefix("regex:"), "So Happy")


def test_bars_hold_for_every_seed():
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
        {"step": 2, SCORE: 3.0, "eval_objective/scores_std": 4.0, KL: 7.0, VIOLATIONS: 0.2},
    ]
    assert deviations(rows, []) == (3.0 - 1.0) / 0.5
    assert after(KL)(rows, []) == 7.0
    assert learning.ratio(VIOLATIONS)(rows, [{VIOLATIONS: 0.1}, {VIOLATIONS: 0.8}]) == pytest.approx(0.2 / 0.8)
    with pytest.raises(KeyError, match="1 rows"):
        after("eval_loss")([{"eval_loss": 3.0}], [])


def test_the_page_has_the_runs_numbers(tmp_path):
    names = ("sft", "constraint-counted", "constraint-skip")
    jobs = {name: [Job(TASKS[name], seed, tmp_path) for seed in (1, 2)] for name in names}
    for job, (first, last) in zip(jobs["sft"], ((3.0, 2.5), (3.2, 2.9)), strict=True):
        leave(job, {"step": 0, "eval_loss": first}, {"step": 5, "loss": 1.0}, {"step": 9, "eval_loss": last})
    leave(jobs["constraint-skip"][0], {"step": 0, VIOLATIONS: 0.2}, {"step": 9, VIOLATIONS: 0.1})
    found = learning.found_of(jobs)
    _, _, sft, _, skip = (line.split(" | ") for line in learning.table(found))
    assert sft[3:] == [
        "2", "3.10 (3.00..3.20)", "2.70 (2.50..2.90)", "drop of the loss at least 0.15: 0.40 (0.30..0.50)", "yes |"
    ]  # fmt: skip
    assert skip[3] == "not run"  # the run it is compared with is missing
    written = learning.write_page(tmp_path / "docs" / "results.md", found)
    assert [path.name for path in written] == ["results.md", "results-curves.png"]
    changed = Job(replace(TASKS["sft"], arguments=(*TASKS["sft"].arguments, "--lora_r", "2")), 1, tmp_path)
    assert learning.finished(changed) is None


def test_a_run_that_fails_is_named_and_leaves_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "make_data", lambda: None)
    leave(Job(TASKS["sft"], 1, tmp_path))
    job = Job(replace(TASKS["sft"], arguments=("sft", "--learning_rat", "1")), 1, tmp_path)
    (failure,) = learning.run_all([job], 1)
    assert failure.startswith("sft-1: exit status 2: onecard: error:")
    assert not (job.folder / RECORD).exists()


def test_the_page_in_docs_is_of_these_tasks():
    """After a change of tasks: `python -m docs.examples.learning --render`, and run what it then lacks."""
    text = (records.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert learning.INTRODUCTION in text
    for task in TASKS.values():
        assert f"`{task.name}`: {task.title}" in text
        assert Job(task, 1, Path("runs/results")).command in text
