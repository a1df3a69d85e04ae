"""The demo's flow with a few steps in each stage: what it writes, what a second run keeps, what --fresh starts over."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from onecard.demo import flow


@pytest.mark.slow
def test_the_whole_demo_reaches_its_bars(onecard, tmp_path):
    """What the README shows is what a person gets: all stages at their real length."""
    result = onecard("demo", "--output_dir", tmp_path / "demo")
    assert result.code == 0, result.err

    def last(stage: str, name: str) -> float:
        return flow.last_metric(tmp_path / "demo" / stage, name)

    assert last("sft", "eval_loss") < 0.5
    assert last("reward", "eval_accuracy") >= 0.9
    assert last("dpo", "eval_rewards/accuracies") >= 0.85
    assert last("ppo", "eval_objective/kl") < 20
    for stage in ("DPO", "PPO"):
        lines = [line for line in result.err.splitlines() if f" {stage} " in line]
        rewards, shares = (next(line for line in lines if words in line) for words in ("mean reward", "without a flaw"))
        before, after = (float(word) for word in re.findall(r"-?\d+\.\d+", rewards))
        assert after > before
        before, after = (int(word) for word in re.findall(r"(\d+)%", shares))
        assert after > before


@pytest.fixture
def short(monkeypatch):
    """Three steps a stage."""
    whole = flow.settings

    def settings(*arguments):
        return {name: (replace(c, max_steps=3, eval_steps=0), run) for name, (c, run) in whole(*arguments).items()}

    monkeypatch.setattr(flow, "settings", settings)
    monkeypatch.setattr(flow, "ANSWERS_EACH", 1)


@pytest.mark.slow
def test_demo_runs_all_stages_once(onecard, short, tmp_path):
    first = onecard("demo", "--output_dir", tmp_path / "demo")
    assert first.code == 0, first.err
    for words in (
        "held-out loss",
        "held-out accuracy",
        "held-out margin",
        "mean reward",
        "without a flaw",
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
        assert (tmp_path / "demo" / path).exists(), path
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "held-out margin" in page
    metrics = (tmp_path / "demo" / "dpo" / "metrics.jsonl").read_bytes()

    again = onecard("demo", "--output_dir", tmp_path / "demo")
    assert again.code == 0, again.err
    assert again.err.count("done already") == 4
    assert (tmp_path / "demo" / "dpo" / "metrics.jsonl").read_bytes() == metrics

    # Another seed in the same folder is refused: a mixture of two demos would be neither.
    corpus = (tmp_path / "demo" / "data" / "sft.jsonl").read_bytes()
    other = onecard("demo", "--output_dir", tmp_path / "demo", "--seed", 7)
    assert other.code == 2
    assert "--seed: 7 here and 4 in" in other.err.splitlines()[-1]
    assert "--fresh" in other.err.splitlines()[-1]
    assert (tmp_path / "demo" / "data" / "sft.jsonl").read_bytes() == corpus

    fresh = onecard("demo", "--output_dir", tmp_path / "demo", "--fresh")
    assert fresh.code == 0, fresh.err
    assert "done already" not in fresh.err


def test_a_folder_with_other_things_is_left_alone(onecard, short, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("{}")
    result = onecard("demo", "--output_dir", tmp_path, "--fresh")
    assert result.code == 2
    assert "holds other things than a demo" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
