"""`onecard ppo` end to end: every estimator, critic and constraint, and what the rows of each say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.ppo_material import all_finite, error_line, metrics, training_rows, tree

FUNCTIONS = """
def dense(completion_ids):
    return [[float(i % 2) for i in ids] for ids in completion_ids]

def cost(completion_ids):
    return [float(ids[0] % 3) for ids in completion_ids]

def dear(completions):
    return [9.0] * len(completions)

def same(completions):
    return [0.3] * len(completions)

def varied(completion_ids):
    return [100.0 + sum(ids) % 7 for ids in completion_ids]
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


VALUE_METRICS = {"loss/value_avg", "val/clipfrac_avg", "val/explained_variance"}
NO_CRITIC = {"--num_generations": 2}
ESTIMATED: dict[str, dict[str, Any]] = {
    "a2c": {},
    "reinforce": {},
    "rloo": NO_CRITIC,
    "grpo": NO_CRITIC,
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_an_estimator_runs_and_its_rows_are_its_own(quick, ppo, tmp_path, name):
    """One pass or two of two minibatches; values where there is a critic, and only there."""
    result = ppo({"--advantage_estimator": name, **ESTIMATED[name]})
    assert result.code == 0, result.err
    once, critic = name in ("a2c", "reinforce"), name == "a2c"
    line = f"num_ppo_epochs: 1 is used instead of 2, because {name} makes one pass over the answers."
    assert (line in result.err) == once
    assert all_finite(tmp_path / "run")
    rows = training_rows(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        assert row["policy/updates"] == (2 if once else 4)
        assert row["grad_norm"] > 0
        expected = {"loss/value_avg", "val/explained_variance"} if critic else set()
        assert row.keys() & VALUE_METRICS == expected
    assert {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir() if path.is_dir()} == (
        {"policy", "value"} if critic else {"policy"}
    )
    if once:
        assert all(row["policy/clipfrac_avg"] == 0 for row in rows)


def test_a_shared_critic_with_bootstrapped_returns(quick, ppo, tmp_path):
    result = ppo({"--critic": "shared", "--bootstrap_truncated": True, "--gradient_checkpointing": True})
    assert result.code == 0, result.err
    assert "value: a head on the policy." in result.err
    first, second = training_rows(tmp_path / "run")
    assert first.keys() >= VALUE_METRICS
    assert first["val/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a head of zeros
    assert second["val/explained_variance"] != 0.0
    weights = load_file(tmp_path / "run" / "checkpoint-2" / "value" / "head.safetensors")
    assert weights["weight"].abs().max() > 0
    assert not (tmp_path / "run" / "policy" / "head.safetensors").exists()


def test_dense_rewards_make_the_score(quick, ppo, tmp_path, functions):
    """Half of one per token: an answer's score is its share of odd tokens, times half its length."""
    result = ppo({"--reward_funcs": f"{functions}:dense", "--reward_weights": 0.5, "--num_ppo_epochs": 1})
    assert result.code == 0, result.err
    for row in metrics(tmp_path / "run"):
        start = "" if "loss" in row else "eval_"
        assert row[f"{start}rewards/dense/mean"] > 0
        assert row[f"{start}objective/scores"] == pytest.approx(0.5 * row[f"{start}rewards/dense/mean"], rel=1e-6)


def test_normalised_scores_begin_around_0(quick, ppo, tmp_path, functions):
    """Scores of 100 to 106; the same two numbers for training, evaluation and samples."""
    result = ppo({"--reward_funcs": f"{functions}:varied", "--normalize_reward": True, "--learning_rate": 0})
    assert result.code == 0, result.err
    said = next(line for line in result.err.splitlines() if line.startswith("normalize_reward:"))
    shift, std = float(said.split()[5]), float(said.split()[9].rstrip(","))
    assert -106 < shift < -100
    for row in metrics(tmp_path / "run"):
        start = "" if "loss" in row else "eval_"
        raw = row[f"{start}rewards/varied/mean"]
        assert 100 <= raw <= 106
        assert row[f"{start}objective/scores"] == pytest.approx((raw + shift) / std, abs=1e-4)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    assert state["job"]["controls"]["scale"] == {
        "mean": pytest.approx(-shift, rel=1e-5),
        "std": pytest.approx(std, rel=1e-5),
    }
    shutil.rmtree(tmp_path / "run")
    before = tree(tmp_path)
    line = error_line(ppo({"--reward_funcs": f"{functions}:same", "--normalize_reward": True}))
    assert "normalize_reward: 20 answers of the starting policy all score 0.3" in line
    assert tree(tmp_path) == before


def test_what_violates_the_constraint_is_not_learned_from(quick, ppo, tmp_path, functions):
    """Costs 0, 1 and 2 with a threshold of 1: as many experiences as do not cost 2."""
    result = ppo(
        {"--constraint_funcs": f"{functions}:cost", "--constraint_threshold": 1, "--num_ppo_epochs": 1,
         "--per_device_train_batch_size": 1, "--seed": 2}  # with some answers of each cost in every row
    )  # fmt: skip
    assert result.code == 0, result.err
    for row in metrics(tmp_path / "run"):
        start = "" if "objective/scores" in row else "eval_"
        assert 0 < row[f"{start}constraint/cost"] < 2
        assert 0 < row[f"{start}constraint/violation_rate"] < 1
        assert f"{start}constraint/lambda" not in row
    for row in training_rows(tmp_path / "run"):  # an update for each answer
        assert row["policy/updates"] == round(8 * (1 - row["constraint/violation_rate"]))


def test_an_iteration_of_violations_alone_makes_no_update(quick, ppo, tmp_path, functions, recwarn):
    result = ppo({"--constraint_funcs": f"{functions}:dear", "--logging_steps": 1})
    assert result.code == 0, result.err
    rows = [row for row in metrics(tmp_path / "run") if "policy/updates" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["policy/updates"] == 0
        assert row["constraint/violation_rate"] == 1
        assert "loss" not in row
        assert abs(row["objective/kl"]) < 1e-5  # nothing has moved
    adapter = load_file(tmp_path / "run" / "policy" / "adapter_model.safetensors")
    assert all(not weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert not [each for each in recwarn if "lr_scheduler" in str(each.message)]


def test_lagrangian_follows_the_cost_of_a_constraint_model(quick, ppo, tmp_path, material):
    """lambda moves by the rate times what the mean cost is above the threshold, and what is maximised pays for it."""
    result = ppo(
        {"--constraint_model_path": material / "rm" / "reward", "--constraint_mode": "lagrangian",
         "--constraint_threshold": -2, "--constraint_lambda": 0.5, "--constraint_lambda_lr": 0.2}
    )  # fmt: skip
    assert result.code == 0, result.err
    first, second = training_rows(tmp_path / "run")
    assert first["constraint/lambda"] == 0.5
    assert second["constraint/lambda"] == pytest.approx(0.5 + 0.2 * (first["constraint/cost"] + 2), rel=1e-6)
    for row in (first, second):
        taken = row["constraint/lambda"] * row["constraint/cost"]
        maximised = row["objective/scores"] + row["objective/non_score_reward"] - taken
        assert row["constraint/cost"] != 0
        assert row["objective/rlhf_reward"] == pytest.approx(maximised, abs=1e-5)
        assert row["policy/updates"] == 4
    assert not (tmp_path / "run" / "checkpoint-2" / "constraint").exists()  # frozen: it is where it was


def test_another_reference_than_the_policy_starts_as(quick, ppo, tmp_path, material):
    """KL is then not 0 at the start, which is no error; to the adapter that the policy starts as, it is."""
    adapter = material / "sft" / "policy"
    more = {"--ref_adapter": adapter, "--kl_estimator": "k3", "--kl_coef": 1}  # k3 is never below 0
    result = ppo(more)
    assert result.code == 0, result.err
    assert metrics(tmp_path / "run")[0]["eval_objective/kl"] != 0
    assert training_rows(tmp_path / "run")[0]["objective/non_score_reward"] < -0.02  # nats an answer
    result = ppo({**more, "--model": adapter, "--overwrite": True})
    assert result.code == 0, result.err
    assert metrics(tmp_path / "run")[0]["eval_objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(training_rows(tmp_path / "run")[0]["objective/non_score_reward"]) < 1e-5


def test_a_dry_run_writes_nothing_and_shows_each_role(quick, ppo, tmp_path, material):
    before = tree(tmp_path)
    changes = {"--reward_model_path": material / "rm" / "reward", "--normalize_reward": True, "--value_init": "zero"}
    result = ppo({"--dry_run": True, **changes})
    assert result.code == 0, result.err
    assert tree(tmp_path) == before
    assert "prompt" in result.out
    for role in ("policy", "value", "reference", "reward"):
        assert f"# {role}: " in result.out


def test_memory_of_each_phase_is_logged(quick, ppo, tmp_path):
    assert ppo({"--max_steps": 1}).code == 0
    [row] = training_rows(tmp_path / "run")
    slack = 0.001  # the kernel's peak lags some pages a thread behind what it counts as resident
    assert 0 < row["memory/rollout_gib"] <= row["memory/peak_gib"] + slack
    assert 0 < row["memory/learn_gib"] <= row["memory/peak_gib"] + slack


def test_other_judges_or_another_reference_are_not_gone_on_with(quick, ppo, tmp_path, material, functions):
    """What a function, a constraint or the reference is belongs to the run, beyond its settings."""
    shutil.copytree(material / "sft" / "policy", tmp_path / "reference")
    shutil.copytree(material / "rm" / "reward", tmp_path / "cost")
    costly = tmp_path / "costly.py"
    costly.write_text(FUNCTIONS)
    more = {
        "--reward_funcs": f"{functions}:varied", "--constraint_funcs": f"{costly}:cost", "--max_steps": 1,
        "--ref_adapter": tmp_path / "reference", "--constraint_model_path": tmp_path / "cost",
        "--constraint_threshold": 5,
    }  # fmt: skip
    result = ppo(more)
    assert result.code == 0, result.err
    for file, what in {
        functions: "reward functions",
        costly: "constraint functions",
        tmp_path / "reference" / "adapter_model.safetensors": "ref_adapter",
        tmp_path / "cost" / "head.safetensors": "constraint model",
    }.items():
        content = file.read_bytes()
        changed = content + b"\n" if file.suffix == ".py" else content[:-4] + b"\x00\x00\x80?"
        file.write_bytes(changed)
        assert f"the {what} of the run" in error_line(ppo({**more, "--resume": True}))
        file.write_bytes(content)
    assert ppo({**more, "--resume": True}).code == 0
