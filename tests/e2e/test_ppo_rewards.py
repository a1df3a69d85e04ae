"""`onecard ppo` with rewards of every kind in one line: built in, dense, and from a classifier of another kind."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.e2e.ppo_material import WORDS, all_finite, error_line, flags, settings, training_rows, write_rows
from tests.engine.data_material import built

FUNCTIONS = """
def vowels(completions, completion_ids):
    return [[0.1 * (i % 3) for i in ids] for ids in completion_ids]
"""


@pytest.mark.usefixtures("quick")
def test_a_mixture_of_all_kinds_in_one_line(onecard, tmp_path, tiny_model):
    """And an edited function does not go on as if it were the one that the run began with."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {0: "rude", 1: "kind"}
    judge = BertForSequenceClassification(
        BertConfig(vocab_size=340, max_position_embeddings=64, id2label=names, **sizes)
    )
    judge.save_pretrained(tmp_path / "judge")
    built("<s> $A </s>").save_pretrained(tmp_path / "judge")
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    rows = [{"prompt": f"the {word} sat on the", "solution": "mat"} for word in WORDS * 2]
    write_rows(tmp_path / "prompts.jsonl", rows)
    model = "3*reward_model + 0.5*fluency + relevance + diversity + 0.1*length:4 + exact_answer"
    changes = {
        "--reward_funcs": f"{model} + {tmp_path}/mine.py:vowels + -1*regex:cat + dog",
        "--reward_model_path": tmp_path / "judge",
        "--reward_label": "kind",
        "--missing_eos_penalty": 0.5,
        "--max_steps": 1,
        "--save_steps": 1,
    }
    words = flags({**settings(tiny_model, tmp_path, tmp_path / "run"), **changes})
    result = onecard("ppo", *words)
    assert result.code == 0, result.err
    [row] = training_rows(tmp_path / "run")
    weights = {
        "reward_model": 3, "fluency": 0.5, "relevance": 1, "diversity": 1, "length": 0.1, "exact_answer": 1,
        "vowels": 1, "regex": -1,
    }  # fmt: skip
    parts = {name.split("/")[1]: value for name, value in row.items() if name.startswith("rewards/")}
    assert parts.keys() == weights.keys()
    total = sum(weight * parts[name] for name, weight in weights.items()) - 0.5 * row["completions/clipped_ratio"]
    assert row["objective/scores"] == pytest.approx(total, abs=1e-5)
    assert parts["vowels"] != 0
    assert all_finite(tmp_path / "run")
    (tmp_path / "mine.py").write_text(FUNCTIONS + "\n# edited")
    assert "the reward functions of the run" in error_line(onecard("ppo", *words, "--resume"))
