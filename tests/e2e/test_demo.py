"""The demo: what it reaches and writes, what a second run keeps, what --fresh starts over."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from onecard.commands.demo import flow
from onecard.config import DemoConfig
from onecard.training import lock
from tests.engine.kill_points import die_before


@pytest.fixture
def short(monkeypatch):
    """A function after which each stage has three steps."""
    whole = flow.settings

    def settings(*arguments):
        return {name: (replace(c, max_steps=3, eval_steps=0), run) for name, (c, run) in whole(*arguments).items()}

    def shorten():
        monkeypatch.setattr(flow, "settings", settings)
        monkeypatch.setattr(flow, "ANSWERS_EACH", 1)

    return shorten


def test_the_demo_reaches_its_bars_and_goes_on_or_starts_over(onecard, short, tmp_path):
    """What the README shows is what a person gets: all stages at their real length."""
    folder = tmp_path / "demo"
    first = onecard("demo", "--output_dir", folder)
    assert first.code == 0, first.err

    def last(stage: str, name: str) -> float:
        return flow.last_metric(folder / stage, name)

    assert last("sft", "eval_loss") < 0.5
    assert last("reward", "eval_accuracy") >= 0.9
    assert last("dpo", "eval_rewards/accuracies") >= 0.85
    assert last("ppo", "eval_objective/kl") < 20
    for stage in ("DPO", "PPO"):
        lines = [line for line in first.err.splitlines() if f" {stage} " in line]
        rewards, shares = (next(line for line in lines if words in line) for words in ("mean reward", "without a flaw"))
        before, after = (float(word) for word in re.findall(r"-?\d+\.\d+", rewards))
        assert after > before
        before, after = (int(word) for word in re.findall(r"(\d+)%", shares))
        assert after > before
    for words in (
        "held-out loss",
        "held-out accuracy",
        "held-out margin",
        "KL to SFT",
        "answers before and after",
    ):
        assert words in first.err
    for path in (
        "report.html",
        "plots/curves.png",
        "sft/policy",
        "reward/reward/head.safetensors",
        "dpo/policy",
        "ppo/policy",
    ):
        assert (folder / path).exists(), path
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "held-out margin" in page
    metrics = (folder / "dpo" / "metrics.jsonl").read_bytes()

    again = onecard("demo", "--output_dir", folder)
    assert again.code == 0, again.err
    assert again.err.count("done already") == 4
    assert (folder / "dpo" / "metrics.jsonl").read_bytes() == metrics

    # Another seed in the same folder is refused: a mixture of two demos would be neither.
    corpus = (folder / "data" / "sft.jsonl").read_bytes()
    other = onecard("demo", "--output_dir", folder, "--seed", 7)
    assert other.code == 2
    assert "--seed: 7 here and 4 in" in other.err.splitlines()[-1]
    assert "--fresh" in other.err.splitlines()[-1]
    assert (folder / "data" / "sft.jsonl").read_bytes() == corpus

    short()
    fresh = onecard("demo", "--output_dir", folder, "--fresh")
    assert fresh.code == 0, fresh.err
    assert "done already" not in fresh.err


def test_a_folder_with_other_things_is_left_alone(onecard, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("{}")
    result = onecard("demo", "--output_dir", tmp_path, "--fresh")
    assert result.code == 2
    assert "holds other things than a demo" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_notes_with_the_marker_s_name_are_left_alone(onecard, tmp_path):
    (tmp_path / "demo.txt").write_text("what I thought of the demo\n")
    result = onecard("demo", "--output_dir", tmp_path)
    assert result.code == 2
    assert "holds other things than a demo" in result.err
    assert (tmp_path / "demo.txt").read_text() == "what I thought of the demo\n"


class StagesBegin(Exception):
    pass


@pytest.fixture
def start(monkeypatch):
    """A function that runs the demo up to where it would make its model."""

    def stop(*arguments):
        raise StagesBegin

    monkeypatch.setattr(flow, "make_tiny_model", stop)
    monkeypatch.setattr("onecard.commands.demo.corpus.SFT_ROWS", 2)

    def run(folder: Path):
        with pytest.raises(StagesBegin):
            flow.run(DemoConfig(output_dir=str(folder)))

    return run


def test_a_demo_that_was_killed_as_it_began_goes_on(start, tmp_path):
    for number in itertools.count():
        folder = tmp_path / f"{number}"
        killed = die_before(number, lambda folder=folder: start(folder), folder)
        start(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["data", "demo.txt"]
        if not killed:
            break
    assert number > 6


@pytest.mark.parametrize("words", [[], ["--fresh"]])
def test_a_second_demo_in_one_folder_is_refused(onecard, start, tmp_path, words):
    start(tmp_path)
    with lock.lock_folder(tmp_path):
        result = onecard("demo", "--output_dir", tmp_path, *words)
    assert result.code == 2
    assert f"process {os.getpid()} is running in {tmp_path}" in result.err


def test_a_file_of_somebody_else_is_never_replaced(onecard, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "settings", lambda *given: pytest.fail("a stage would have begun"))
    folder = tmp_path / "demo"
    notes = folder / "model" / "notes.md"
    folder.mkdir()
    (folder / flow.MARKER).write_text(flow.MARKER_TEXT)
    notes.parent.mkdir()
    notes.write_text("mine")
    result = onecard("demo", "--output_dir", folder, "--fresh")
    assert result.code == 2
    assert f"{notes} is not a file of the tiny model" in result.err
    assert notes.read_text() == "mine"
