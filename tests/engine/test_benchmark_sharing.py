"""The sharing benchmark: both ways do the same work, on pairs of the lengths asked for; a wrong one is refused."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import sharing
from onecard.data.batches import LEAST_SHARED, answers, shared_tokens


def test_pairs_are_of_the_lengths_asked_for():
    pairs = sharing.draw_pairs(6, 5, 100)
    assert len(pairs) == 4  # 22 tokens each
    for pair in pairs:
        assert len(pair.chosen) == len(pair.rejected) == 11
        assert pair.chosen.tokens[:6] == pair.rejected.tokens[:6]
        assert pair.chosen.tokens != pair.rejected.tokens
        assert sum(pair.chosen.response_mask) == 5
    assert len({pair.chosen.tokens for pair in pairs}) == 4
    assert len(sharing.draw_pairs(60, 5, 100)) == 2


def test_short_prompts_are_shared_too_while_it_measures():
    (pair, _) = sharing.draw_pairs(2, 5, 1)
    with sharing.every_prompt_shared():
        assert shared_tokens(pair.chosen, pair.rejected) == 2
    assert answers.LEAST_SHARED == LEAST_SHARED
    assert shared_tokens(pair.chosen, pair.rejected) == 0


def test_the_command_writes_one_record(tmp_path, capsys):
    words = ["--shape", "4/6", "--shape", "20/3", "--tokens", "60", "--repeats", "2", "--out", str(tmp_path)]
    assert sharing.main(words) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("sharing-")
    found = json.loads(path.read_text())
    assert [(case["prompt"], case["response"], case["pairs"]) for case in found["cases"]] == [(4, 6, 3), (20, 3, 2)]
    for case in found["cases"]:
        shared, apart = case["rows"]
        assert apart["rows"] == case["tokens"] == 2 * case["pairs"] * (case["prompt"] + case["response"])
        assert shared["rows"] == apart["rows"] - case["pairs"] * case["prompt"]
        assert 0 < case["error"] < 1e-5
        assert case["memory"] == shared["peak_bytes"] / apart["peak_bytes"]
        for row in case["rows"]:
            assert row["rate"]["median"] == pytest.approx(sum(case["tokens"] / taken for taken in row["seconds"]) / 2)
        ratios = [slow / fast for fast, slow in zip(shared["seconds"], apart["seconds"], strict=True)]
        assert case["speedup"]["median"] == pytest.approx(sum(ratios) / 2)
    assert found["cases"][1]["memory"] < 0.9
    assert "tokens/s" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch, capsys):
    honest = sharing.Step.gradient
    calls: list[torch.Tensor] = []

    def wrong(self: sharing.Step) -> torch.Tensor:
        calls.append(honest(self))
        return calls[-1] * (1 + 1e-3 * len(calls))

    monkeypatch.setattr(sharing.Step, "gradient", wrong)
    assert sharing.main(["--shape", "4/6", "--tokens", "20", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    assert "gradients are off by" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["256", "0/4", "a/b", "4/0"])
def test_a_shape_that_is_none_is_one_line(capsys, shape):
    assert sharing.main(["--shape", shape]) == 2
    assert "expected tokens of prompt and answer" in capsys.readouterr().err
