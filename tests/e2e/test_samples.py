"""Samples at each evaluation: they are written, and change nothing of the training."""

from __future__ import annotations

import json
from pathlib import Path

from onecard.algorithms.samples import PREFIX_LENGTH, prompt_of
from onecard.data.batches import LabelledSequence, PreferencePair, TokenSequence
from onecard.reporting import read_samples
from tests.e2e.test_resume import arguments, metrics, stop_at, weights


def sequence(prompt: int, response: int) -> TokenSequence:
    return TokenSequence(tuple(range(prompt + response)), (False,) * prompt + (True,) * response)


def test_the_prompt_ends_before_the_first_learned_token():
    answer, other = sequence(3, 2), sequence(3, 5)
    assert prompt_of(answer) == (0, 1, 2)
    assert prompt_of(PreferencePair(answer, other)) == (0, 1, 2)
    assert prompt_of(LabelledSequence(answer, True, other)) == (0, 1, 2)
    assert prompt_of(sequence(0, 20)) == tuple(range(PREFIX_LENGTH))
    assert prompt_of(sequence(0, 3)) == (0, 1, 2)


def samples(folder: Path) -> list[dict[str, object]]:
    path = folder / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_samples_are_written_and_change_nothing(onecard, monkeypatch, tmp_path, tiny_model, pairs, quick):
    """With samples, without, and resumed: the same weights and metrics. Resumed: the same samples too."""

    def run(folder: str, *more: object) -> int:
        return onecard("dpo", *arguments(tiny_model, pairs, tmp_path / folder, "--eval_sample_length", 6, *more)).code

    assert run("without", "--eval_samples", 0) == 0
    assert run("with", "--eval_samples", 2) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run("stopped", "--eval_samples", 2) == 130
    assert run("stopped", "--eval_samples", 2, "--resume") == 0
    assert weights(tmp_path / "without") == weights(tmp_path / "with")
    assert metrics(tmp_path / "without") == metrics(tmp_path / "with")
    rows = samples(tmp_path / "with")
    assert samples(tmp_path / "without") == []
    assert samples(tmp_path / "stopped") == rows
    assert [row["step"] for row in rows] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert len({row["prompt"] for row in rows}) == 2
    assert len({row["completion"] for row in rows if row["prompt"] == rows[0]["prompt"]}) > 1  # the policy has changed
    shown = read_samples(tmp_path / "with" / "samples.jsonl")
    assert [side.name for side in shown[0].sides] == ["before", "step 6", "after"]
    said = [row["completion"] for row in rows if row["prompt"] == shown[1].prompt]
    assert [side.text for side in shown[1].sides] == [said[0], said[2], said[3]]


def test_a_response_without_room_in_the_context_is_not_asked_for(onecard, tmp_path, tiny_model, pairs, quick):
    """128 positions: no prompt fits beside 128 tokens."""
    flags = arguments(tiny_model, pairs, tmp_path / "run", "--eval_samples", 4, "--eval_sample_length", 128)
    flags[flags.index("--max_steps") + 1] = "1"
    assert onecard("dpo", *flags).code == 0
    assert samples(tmp_path / "run") == []
