"""The rollout benchmark's counting and its record: a ratio of tokens per second is only as good as these."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import measure, rollout
from benchmarks.rollout import OURS, PEER, Row, ended_length, lengths, ours, peer, random_task, ratio_of
from onecard.rollout import Sampling

CPU = torch.device("cpu")


def test_tokens_count_up_to_and_with_the_end():
    assert ended_length([5, 6, 2, 0, 0, 2], {2, 9}) == 3
    assert ended_length([2, 2], {2}) == 1
    assert ended_length([5, 6, 7], {2}) == 3
    assert ended_length([5, 6, 2], {2}) == 3


def test_prompts_are_of_all_lengths_in_no_order():
    assert sorted(lengths(61)) == list(range(rollout.LEAST_PROMPT, rollout.MOST_PROMPT + 1))
    assert lengths(61) != sorted(lengths(61))


def test_both_samplers_do_the_same_work():
    """Of random weights every token ends with the same probability, so both draw lengths of the same distribution."""
    task = random_task(96, Sampling(64), 48, CPU, torch.float32)
    share = 1 / rollout.ENDING_SHARE
    expected = 96 * (1 - (1 - share) ** 64) / share
    spread = 96**0.5 / share
    torch.manual_seed(0)
    for count in (ours(task), peer(task)):
        assert abs(count - expected) < 4 * spread
        assert count < 96 * 64 * 0.8


def test_the_ratio_is_taken_round_by_round():
    def row(name: str, role: str, seconds: tuple[float, ...], tokens: tuple[int, ...]) -> Row:
        return Row(name, role, seconds, tokens, measure.spread([1.0]))

    first = row(OURS, "ours", (1.0, 2.0, 10.0), (100, 200, 400))  # 100, 100, 40 tokens/s
    second = row(PEER, "peer", (2.0, 1.0, 20.0), (100, 50, 400))  # 50, 50, 20
    assert ratio_of(first, second).median == pytest.approx(2.0)
    assert ratio_of(first, second).q3 == pytest.approx(2.0)


def test_the_command_writes_one_record(tmp_path, capsys):
    words = ["--num-prompts", 6, "--batch-size", 3, "--max-new-tokens", 10, "--repeats", 2, "--output", tmp_path]
    assert rollout.main([str(word) for word in words]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("rollout-")
    found = json.loads(path.read_text())
    assert [row["role"] for row in found["rows"]] == ["ours", "peer"]
    for row in found["rows"]:
        assert len(row["seconds"]) == len(row["tokens"]) == 2
        rates = [count / seconds for count, seconds in zip(row["tokens"], row["seconds"], strict=True)]
        assert row["rate"]["median"] == pytest.approx(sum(rates) / 2)
        assert all(6 <= count <= 60 for count in row["tokens"])
    assert found["error_logprobs"] < 1e-4
    assert found["ratio"]["count"] == 2
    out = capsys.readouterr().out
    assert "ratio" in out
    assert "tokens/s" in out


def test_a_pretrained_model_gets_the_first_words_of_a_file(tinystories, stories):
    task = rollout.model_task(str(tinystories), str(stories), 70, Sampling(8), 4)
    assert [len(prompt) for prompt in task.prompts] == lengths(70)
    assert len(set(task.prompts)) == 70
    assert rollout.error_of_ours(task) < 1e-4


def test_wrong_log_probabilities_are_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "error_of_ours", lambda task: 0.1)
    assert rollout.main(["--num-prompts", "2", "--max-new-tokens", "4", "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    assert "off by 0.1 nat" in capsys.readouterr().err


def test_a_model_without_prompts_is_one_line(capsys):
    assert rollout.main(["--model", "x"]) == 2
    assert "give both" in capsys.readouterr().err
