"""The demo: what it reaches and writes, what a second run keeps, what --fresh starts over."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from onecard.demo import flow


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


@pytest.mark.slow
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
