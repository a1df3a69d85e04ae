"""`onecard generate`: what the command checks, prints and writes. The sampling itself is in test_rollout.py."""

from __future__ import annotations

import json
import re

import pytest

WORDS = ["--max_new_tokens", 6, "--seed", 3]


def test_one_prompt_prints_a_response_and_several_name_theirs(onecard, tiny_model):
    alone = onecard("generate", "--model", tiny_model, "--prompt", "the cat", "--temperature", 0, *WORDS)
    both = onecard(
        "generate", "--model", tiny_model, "--prompt", "the cat", "--prompt", "a", "--temperature", 0, *WORDS
    )
    assert alone.code == both.code == 0, alone.err + both.err
    assert both.out.startswith(f"the cat ->{alone.out}")
    assert "\na ->" in both.out


def test_rows_are_written_in_order_with_each_response(onecard, tiny_model, tmp_path):
    prompts = ["the cat", "a long prompt about a hen and a dog", "b"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    result = onecard(
        "generate", "--model", tiny_model, "--dataset", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl",
        "--num_generations", 3, "--batch_size", 4, *WORDS,
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(3)]
    assert len({row["completion"] for row in rows}) > 3
    assert result.out == ""
    assert "9 responses" in result.err


def test_the_bar_shows_tokens_per_second(onecard, tiny_model):
    assert "tok/s" in onecard("generate", "--model", tiny_model, "--prompt", "the cat", *WORDS).err


def test_top_k_and_temperature_reach_the_sampler(onecard, tiny_model):
    common = ["generate", "--model", tiny_model, "--prompt", "the cat", "--max_new_tokens", 20]
    greedy = onecard(*common, "--temperature", 0, "--seed", 1).out
    assert onecard(*common, "--top_k", 1, "--seed", 2).out == greedy
    assert onecard(*common, "--top_p", 0, "--seed", 3).out == greedy
    assert onecard(*common, "--seed", 4).out != greedy
    assert onecard(*common, "--seed", 4).out != onecard(*common, "--seed", 5).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "b", "--prompt", "the cat sat " * 60], r"--prompt:2: prompt: \d+ tokens, expected at most 122"),
        (["--prompt", "b", "--max_new_tokens", 128], "128 leaves no room for a prompt in the model's context of 128"),
        (["--prompt", "b", "--top_p", 1.5], "top_p: 1.5, expected 0 to 1"),
        ([], "--prompt or --dataset: give one of them"),
    ],
)
def test_what_cannot_be_done_is_one_line(onecard, tiny_model, arguments, message):
    result = onecard("generate", "--model", tiny_model, "--max_new_tokens", 6, *arguments)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert re.search(message, result.err)


def test_the_last_place_of_the_context_can_be_used(onecard, tiny_model):
    result = onecard("generate", "--model", tiny_model, "--prompt", "b", "--max_new_tokens", 127)
    assert result.code == 0, result.err
