"""`onecard reward` on each kind of rows: what it logs, what its head becomes, and what PPO sees of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from onecard.config import ModelConfig
from onecard.data import load_rows, scored_examples
from onecard.models.build import load_frozen_role
from onecard.models.load import load_tokenizer
from onecard.rewards.adapter import score, score_sequences
from onecard.training import trainer
from tests.e2e.ppo_material import (
    WORDS,
    error_line,
    flags,
    metrics,
    settings,
    training_rows,
    without_clock,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("quick")

SMALL = ["--max_steps", 4, "--learning_rate", 1e-2, "--test_size", 6, "--per_device_train_batch_size", 4]
ROWS = {
    "pairs": [{"prompt": f"the {word} {i}", "chosen": " good answer", "rejected": " bad mat"}
              for i in range(4) for word in WORDS],
    "scores": [{"prompt": f"the {word} {i}", "completion": f" sat on {i}", "score": (i + len(word)) % 5 / 4}
               for i in range(4) for word in ("cat", "mouse", "crow", "elephant", "ox", "snake")],
    "rankings": [{"prompt": f"the {word} {i}", "completions": [" good answer", " a cat", " bad mat"][: 2 + i % 2]}
                 for i in range(4) for word in WORDS],
}  # fmt: skip


@pytest.fixture
def reward(onecard, tmp_path, tiny_model, quick) -> Any:
    """`reward("scores", "--normalize_scores")`: a small run in tmp_path/run, which has to work."""

    def run(kind: str, *more: object, folder: str = "run", code: int = 0) -> Any:
        rows = write_rows(tmp_path / f"{kind}.jsonl", ROWS[kind])
        given = ["--model", tiny_model, "--dataset", rows, "--output_dir", tmp_path / folder, *SMALL]
        result = onecard("reward", *given, *more)
        assert result.code == code, result.err
        return result

    return run


def about(folder: Path) -> dict[str, str]:
    with safe_open(str(folder / "head.safetensors"), "pt") as file:
        return file.metadata() or {}


def scores_of(folder: Path, kind: str = "scores") -> tuple[torch.Tensor, list[float]]:
    """What an exported reward model makes of its own rows, and the scores that those have."""
    config = ModelConfig(model=str(folder / "run" / "reward"))
    roles, tokenizer = load_frozen_role(config, role="reward", head=True), load_tokenizer(config)
    rows = load_rows(str(folder / f"{kind}.jsonl"), split="train")
    made = scored_examples(rows, tokenizer, max_length=64, skip_bad_rows=False).examples
    return torch.tensor(score_sequences(roles, [item.sequence for item in made], batch_size=8)), [i.score for i in made]


COMMON = {"eval_loss", "eval_accuracy", "eval_mean_reward", "eval_min_reward", "eval_max_reward", "eval_std_reward"}
EXPECTED = {
    "pairs": COMMON | {"eval_margin"},
    "scores": COMMON | {"eval_mse", "eval_pearson", "eval_spearman"},
    "rankings": COMMON | {"eval_margin"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_metrics_of_each_kind(reward, tmp_path, kind):
    """The numbers of held-out rows do not depend on how they are cut for evaluation."""
    for size, folder in ((16, "run"), (1, "other")):
        reward(kind, "--per_device_eval_batch_size", size, folder=folder)
    first, other = ([row for row in metrics(tmp_path / name) if "eval_loss" in row] for name in ("run", "other"))
    assert len(first) == 2
    for row, again in zip(first, other, strict=True):
        assert row.keys() == EXPECTED[kind] | {"step"}
        assert row == pytest.approx(again, rel=1e-4, abs=1e-5)
        assert row["eval_min_reward"] < row["eval_mean_reward"] < row["eval_max_reward"]
        assert kind != "scores" or row["eval_loss"] == row["eval_mse"]
    for row in training_rows(tmp_path / "run"):
        assert row["min_reward"] < row["mean_reward"] < row["max_reward"]
    assert about(tmp_path / "run" / "reward") == {"score_activation": "none"}


def test_held_out_metrics_are_those_of_the_exported_model(reward, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", ROWS["scores"][::2])
    reward("scores", "--eval_dataset", held)
    scores, given = scores_of(tmp_path)
    found, wanted = scores[::2], torch.tensor(given[::2])
    row = next(row for row in reversed(metrics(tmp_path / "run")) if "eval_loss" in row)
    assert row["eval_mse"] == pytest.approx((found - wanted).square().mean().item(), rel=1e-4)
    correlation = torch.corrcoef(torch.stack([found, wanted]))[0, 1].item()
    assert row["eval_pearson"] == pytest.approx(correlation, abs=1e-3)
    assert row["eval_std_reward"] == pytest.approx(found.std().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "setting", "held", "expected"),
    [
        ("scores", ("--score_activation", "sigmoid"), "pairs", {"eval_accuracy", "eval_margin"}),
        ("pairs", ("--center_rewards_coefficient", 0.01), "scores", {"eval_mse", "eval_pearson"}),
    ],
)
def test_settings_are_for_the_training_rows_whatever_is_held_out(reward, tmp_path, kind, setting, held, expected):
    other = write_rows(tmp_path / "held.jsonl", ROWS[held][:6])
    reward(kind, *setting, "--eval_dataset", other, "--max_steps", 1)
    assert metrics(tmp_path / "run")[-1].keys() >= expected
    trained = tmp_path / f"{held}.jsonl"
    line = error_line(reward(held, *setting, "--eval_dataset", tmp_path / f"{kind}.jsonl", folder="other", code=2))
    assert f"{setting[0][2:]}: " in line
    assert f"but {trained} has {held}." in line
    assert not (tmp_path / "other").exists()


def test_held_out_pairs_are_counted_once(reward, tmp_path):
    """Of one pair, the loss follows from the margin."""
    reward("pairs", "--test_size", 1, "--max_steps", 1)
    for row in metrics(tmp_path / "run"):
        if "eval_loss" in row:
            assert row["eval_loss"] == pytest.approx(math.log1p(math.exp(-row["eval_margin"])), rel=1e-5)


def test_a_sigmoid_goes_with_the_model(reward, onecard, tmp_path, tiny_model, material):
    """Scores lie in 0..1 wherever the model is used; the critic that starts as it does not."""
    reward("scores", "--score_activation", "sigmoid")
    folder = tmp_path / "run" / "reward"
    assert about(folder) == {"score_activation": "sigmoid"}
    assert about(tmp_path / "run" / "checkpoint-4" / "reward") == {"score_activation": "sigmoid"}
    head = load_file(str(folder / "head.safetensors"))
    roles = load_frozen_role(ModelConfig(model=str(folder)), role="reward", head=True)
    scores, _ = scores_of(tmp_path)
    assert 0 < scores.min() < scores.max() < 1
    tokenizer = load_tokenizer(ModelConfig(model=str(tiny_model)))
    [said] = score(roles, tokenizer, ["the cat 0"], [" sat on 0"], max_length=64, batch_size=2)
    assert said == pytest.approx(scores[0].item(), abs=1e-6)

    flags_ = settings(tiny_model, material, tmp_path / "ppo") | {
        "--reward_model_path": folder, "--reward_funcs": None, "--max_steps": 1, "--learning_rate": 0.0,
        "--kl_coef": 0.0,
    }  # fmt: skip
    result = onecard("ppo", *flags(flags_))
    assert result.code == 0, result.err
    assert all(0 < row["objective/scores"] < 1 for row in training_rows(tmp_path / "ppo"))
    value = tmp_path / "ppo" / "checkpoint-1" / "value"
    assert about(value) == {"score_activation": "none"}
    tangent = load_file(str(value / "head.safetensors"))
    assert tangent["weight"].equal(head["weight"] / 4)
    assert tangent["bias"].allclose(head["bias"] / 4 + 0.5, rtol=1e-6)

    bad = error_line(
        onecard("reward", "--model", folder, "--dataset", tmp_path / "scores.jsonl", "--output_dir", tmp_path / "more")
    )
    assert "score_activation: none, but the reward model" in bad
    assert "was trained with sigmoid" in bad


def test_an_unknown_activation_is_refused(reward, onecard, tmp_path):
    from safetensors.torch import save_file

    reward("scores")
    path = tmp_path / "run" / "reward" / "head.safetensors"
    save_file(load_file(str(path)), str(path), metadata={"score_activation": "tanh"})
    again = ["--dataset", tmp_path / "scores.jsonl", "--output_dir", tmp_path / "more"]
    line = error_line(onecard("reward", "--model", path.parent, *again))
    assert "head.safetensors: unknown score_activation 'tanh'; expected one of none, sigmoid." in line


@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_normalized_scores(reward, tmp_path, kind):
    """Training rows' scores come to mean 0 and standard deviation 1; checkpoints keep the head as it is trained."""
    plain = reward(kind, "--test_size", 0, folder="plain")
    result = reward(kind, "--normalize_scores", "--test_size", 0)
    assert "normalize_scores: mean " not in plain.err
    assert "of 24 training rows' scores." in result.err
    answers = [
        {"prompt": row["prompt"], "completion": row[name], "score": 0}
        for row in ROWS[kind]
        for name in ("chosen", "rejected", "completion")
        if name in row
    ]
    write_rows(tmp_path / "answers.jsonl", answers)
    scores, _ = scores_of(tmp_path, "answers")
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)

    heads = [load_file(str(tmp_path / place / "head.safetensors"))
             for place in ("run/reward", "plain/reward", "run/checkpoint-4/reward")]  # fmt: skip
    assert all(heads[1][name].equal(heads[2][name]) for name in heads[1])
    said = about(tmp_path / "run" / "reward")
    mean, std = float(said["score_mean"]), float(said["score_std"])
    assert heads[0]["weight"].allclose(heads[1]["weight"] / std, rtol=1e-6)
    assert heads[0]["bias"].allclose((heads[1]["bias"] - mean) / std, rtol=1e-5, atol=1e-6)
    assert about(tmp_path / "run" / "checkpoint-4" / "reward") == {"score_activation": "none"}


def test_normalized_scores_of_a_sigmoid_contradict_each_other(reward, tmp_path):
    result = reward("scores", "--normalize_scores", "--score_activation", "sigmoid", code=2)
    assert error_line(result).startswith("onecard: error: normalize_scores: with score_activation sigmoid, scores lie")
    assert not (tmp_path / "run").exists()


def test_scores_that_are_all_the_same_have_no_scale(reward, monkeypatch):
    from onecard.algorithms.reward import command

    monkeypatch.setattr(command, "scores_of", lambda roles, batch, size, bar: torch.full((len(batch.lengths),), 0.25))
    line = error_line(reward("pairs", "--normalize_scores", "--test_size", 0, code=2))
    assert "normalize_scores: the answers of 24 training rows all score 0.25, so their standard deviation is 0" in line


@pytest.mark.parametrize("kind", ["scores", "rankings"])
def test_a_resumed_run_is_the_same_bit_for_bit(reward, tmp_path, monkeypatch, kind):
    more = ["--normalize_scores", "--save_steps", 2, "--logging_steps", 3, "--max_length", 64]
    reward(kind, *more, folder="whole")
    apply, calls = trainer.Trainer.optimizer_step, []

    def interrupted(self):
        calls.append(self.step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        apply(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "optimizer_step", interrupted)
        reward(kind, *more, code=130)
    reward(kind, *more, "--resume")
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "whole")
    for name in ("adapter_model", "head"):
        first, other = (load_file(str(tmp_path / run / "reward" / f"{name}.safetensors")) for run in ("whole", "run"))
        assert all(first[key].equal(other[key]) for key in first), name
    assert about(tmp_path / "run" / "reward") == about(tmp_path / "whole" / "reward")


def test_prompts_that_are_learned_too_are_on_one_side(onecard, tmp_path, tiny_model, quick):
    """With --no_completion_only_loss the mask does not say where a prompt ends; rows of one prompt stay together."""
    records = [{"prompt": f"the {WORDS[i % 2]}", "completion": f" sat on {i}"} for i in range(12)]
    rows = write_rows(tmp_path / "rows.jsonl", records)
    given = ["--model", tiny_model, "--dataset", rows, "--output_dir", tmp_path / "run", "--max_steps", 1]
    result = onecard("sft", *given, "--test_size", 3, "--no_completion_only_loss", "--eval_samples", 0)
    assert result.code == 0, result.err
    assert "6 examples to train on, 6 held out." in result.err
    cut = ["--truncation_mode", "keep_end", "--max_length", 6, "--overwrite", "--eval_samples", 0]
    result = onecard("sft", *given, *cut)
    assert result.code == 0, result.err
    assert "12 of 12 prompts were cut at their beginning" in result.err


def test_ppo_cuts_long_prompts_where_it_is_told_to(onecard, tmp_path, tiny_model, material, quick):
    prompts = [{"prompt": f"the {word} " + "sat on the mat " * 12} for word in WORDS] + [
        {"prompt": "a"},
        {"prompt": "b"},
    ]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    given = settings(tiny_model, material, tmp_path / "run") | {
        "--dataset": tmp_path / "prompts.jsonl", "--max_length": 32, "--test_size": 0, "--max_steps": 1,
    }  # fmt: skip
    assert "prompt: " in error_line(onecard("ppo", *flags(given)))
    result = onecard("ppo", *flags(given | {"--truncation_mode": "keep_end"}))
    assert result.code == 0, result.err
    assert "6 of 8 prompts were cut at their beginning" in result.err
