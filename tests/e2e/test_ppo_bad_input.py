"""Bad input to `onecard ppo`, startup checks among it: one line, exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.algorithms.ppo import command, startup
from onecard.models import build, load
from onecard.rollout import sampler
from tests.e2e.bad_input_material import change_json
from tests.e2e.ppo_material import error_line, tree, write_rows

BAD_FUNCTIONS = """
def raises(completions, **kwargs):
    raise ValueError("two\\nlines")

def exits(completions, **kwargs):
    raise SystemExit(0)

def nan(completions, **kwargs):
    return [float("nan")] * len(completions)

def none(completions, **kwargs):
    return [None] * len(completions)

def few(completions, **kwargs):
    return [1.0]

def dense(completion_ids, **kwargs):
    return [[0.0] * (len(ids) + 1) for ids in completion_ids]

def half_dense(completion_ids, **kwargs):
    return [0.0, *([0.0] * len(ids) for ids in completion_ids[1:])]

def misspelt(completions, solutoin):
    return [0.0] * len(completions)

def needs_solution(completions, solution):
    return [0.0] * len(completions)
"""


# settings that are changed ({m}: the material's folder, {tmp}: the test's), and what the line has to say
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "function raises": ({"--reward_funcs": "{tmp}/bad.py:raises"}, ["bad.py:raises raised ValueError: two lines"]),
    "function exits": ({"--reward_funcs": "{tmp}/bad.py:exits"}, ["bad.py:exits raised SystemExit"]),
    "function gives NaN": ({"--reward_funcs": "{tmp}/bad.py:nan"}, ["bad.py:nan returned nan", "prompt", "response"]),
    "function gives None": ({"--reward_funcs": "{tmp}/bad.py:none"}, ["bad.py:none returned None"]),
    "function gives too few": ({"--reward_funcs": "{tmp}/bad.py:few"}, ["bad.py:few returned a list of 1", "of 8"]),
    "dense rewards of another count": (
        {"--reward_funcs": "{tmp}/bad.py:dense"}, ["bad.py:dense returned", "one number for each of its"],
    ),
    "dense rewards of some answers": (
        {"--reward_funcs": "{tmp}/bad.py:half_dense"}, ["bad.py:half_dense returned", "either for all", "response"],
    ),
    "column misspelt": (
        {"--reward_funcs": "{tmp}/bad.py:misspelt"}, ["asks for 'solutoin'", "Did you mean 'solution'?"],
    ),
    "held-out rows lack a column": (
        {"--reward_funcs": "{tmp}/bad.py:needs_solution", "--eval_dataset": "{tmp}/plain.jsonl"},
        ["bad.py:needs_solution asks for 'solution'"],
    ),
    "one of two functions raises": (
        {"--reward_funcs": ["{m}/good.py:score", "{tmp}/bad.py:raises"]}, ["bad.py:raises raised"],
    ),
    "no such module": ({"--reward_funcs": "nowhere.at.all:f"}, ["reward_funcs", "no module 'nowhere'"]),
    "no such function": ({"--reward_funcs": "{m}/good.py:scor"}, ["has no 'scor'", "Did you mean 'score'?"]),
    "no such file": ({"--reward_funcs": "{tmp}/none.py:f"}, ["none.py cannot be read"]),
    "file that does not compile": ({"--reward_funcs": "{tmp}/torn.py:f"}, ["torn.py raised SyntaxError"]),
    "not a function": ({"--reward_funcs": "{m}/good.py:not_a_function"}, ["not_a_function' is no function"]),
    "no address": ({"--reward_funcs": "score"}, ["'score' is no address of a function"]),
    "built-in misspelt": ({"--reward_funcs": "0.5*fluncy + length"}, ["'fluncy'", "Did you mean 'fluency'?"]),
    "weights twice": (
        {"--reward_funcs": "0.5*fluency + length", "--reward_weights": [1, 2]}, ["reward_weights: given, and so is"],
    ),
    "label of no classifier": (
        {"--reward_model_path": "{m}/rm/reward", "--reward_label": "good"}, ["reward_label: 'good'", "reward is none"],
    ),
    "no reward at all": ({"--reward_funcs": None}, ["--reward_model_path or --reward_funcs is missing"]),
    "weights of another count": ({"--reward_weights": [1, 2]}, ["reward_weights: 2 given (1, 2), expected 1"]),
    "no prompts": ({"--dataset": "{tmp}/empty.jsonl"}, ["empty.jsonl: the file is empty"]),
    "no prompt column": (
        {"--dataset": "{tmp}/columns.jsonl"}, ["columns.jsonl:1: no column 'prompt'", "there are promt", "'promt'?"],
    ),
    "no dataset": ({"--dataset": None}, ["--dataset is missing"]),
    "no prompt left to train on": ({"--test_size": 24}, ["test_size"]),
    "prompt too long": ({"--dataset": "{tmp}/long.jsonl"}, ["long.jsonl:2: prompt:", "at most 120, so that"]),
    "response past the context": ({"--response_length": 128}, ["response_length: 128 leaves no room", "128 tokens"]),
    "response past max_length": ({"--max_length": 8}, ["response_length: 8", "max_length (8)"]),
    "policy that is a reward model": ({"--model": "{m}/rm"}, ["model:", "rm/reward is a reward model"]),
    "reward of another base": ({"--reward_model_path": "{tmp}/other"}, ["reward_model_path", "trained on {tmp}/base"]),
    "reward that is a model": ({"--reward_model_path": "{model}"}, ["reward_model_path", "is no reward adapter"]),
    "reward without a head": (
        {"--reward_model_path": "{m}/sft/policy"}, ["reward_model_path", "sft/policy is no reward adapter"],
    ),
    "no such reward": ({"--reward_model_path": "{tmp}/nowhere"}, ["reward_model_path: no folder", "nowhere"]),
    "reward with a torn head": ({"--reward_model_path": "{tmp}/torn-head"}, ["torn-head/head.safetensors:"]),
    "reward with a head of another width": (
        {"--reward_model_path": "{tmp}/wide-head"}, ["wide-head/head.safetensors:", "size mismatch", "[1, 65]"],
    ),
    "reward that is torn": ({"--reward_model_path": "{tmp}/torn-reward"}, ["reward_model_path:", "torn-reward:"]),
    "reward of another shape": (
        {"--reward_model_path": "{tmp}/wide-reward"},
        ["reward_model_path:", "wide-reward does not fit the model: its ", "q_proj", "[65, 65] instead of"],
    ),
    "reward that scores NaN": ({"--reward_model_path": "{tmp}/nan-head"}, ["reward_model is nan"]),
    "minibatch above batch_size": ({"--batch_size": 2}, ["batch_size: 2", "minibatch", "= 4"]),
    "batch_size no multiple": ({"--batch_size": 6}, ["batch_size: 6, expected a multiple", "= 4"]),
    "num_generations does not divide": ({"--num_generations": 3}, ["num_generations: 3", "8 responses"]),
    "temperature 0": ({"--temperature": 0}, ["temperature: 0, expected above 0"]),
    "dual_clip below 1": ({"--dual_clip": 0.5}, ["dual_clip: 0.5, expected above 1"]),
    "cliprange 0": ({"--cliprange": 0}, ["cliprange: 0"]),
    "gamma above 1": ({"--gamma": 1.5}, ["gamma: 1.5, expected 0 to 1"]),
    "lam above 1": ({"--lam": 1.5}, ["lam: 1.5, expected 0 to 1"]),
    "KL target 0": ({"--adap_kl_ctrl": True, "--adap_kl_target": 0}, ["adap_kl_target: 0"]),
    "a group of one": ({"--advantage_estimator": "grpo"}, ["num_generations: 1, expected at least 2", "grpo"]),
    "a group's reward per token": (
        {"--advantage_estimator": "rloo", "--num_generations": 2, "--whiten_rewards": True}, ["whiten_rewards", "rloo"],
    ),
    "discount of whole answers": (
        {"--advantage_estimator": "rloo", "--num_generations": 2, "--gamma": 0.9}, ["gamma: 0.9, expected 1", "rloo"],
    ),
    "a clip of what is not clipped": (
        {"--advantage_estimator": "a2c", "--dual_clip": 2}, ["dual_clip: 2, expected 0", "a2c"],
    ),
    "going on without a critic": (
        {"--advantage_estimator": "reinforce", "--bootstrap_truncated": True}, ["bootstrap_truncated", "no critic"],
    ),
    "sharing no critic": (
        {"--advantage_estimator": "reinforce", "--critic": "shared"}, ["critic: shared", "no critic"],
    ),
    "multiplier of nothing": ({"--constraint_mode": "lagrangian"}, ["constraint_mode: lagrangian", "neither"]),
    "setting without a use": (
        {"--advantage_estimator": "a2c", "--lam": 0.9}, ["lam: 0.9 is not used with advantage_estimator a2c"],
    ),
    "normalised scores, and a critic of raw ones": (
        {"--reward_model_path": "{m}/rm/reward", "--normalize_reward": True}, ["normalize_reward", "--value_init zero"],
    ),
    "constraint of another base": (
        {"--constraint_model_path": "{tmp}/other"}, ["constraint_model_path", "trained on {tmp}/base"],
    ),
    "constraint without a head": (
        {"--constraint_model_path": "{m}/sft/policy"}, ["constraint_model_path", "sft/policy is no reward adapter"],
    ),
    "constraint of another shape": (
        {"--constraint_model_path": "{tmp}/wide-reward"},
        ["constraint_model_path:", "wide-reward does not fit the model: its ", "q_proj", "[65, 65] instead of"],
    ),
    "constraint that costs NaN": ({"--constraint_model_path": "{tmp}/nan-head"}, ["constraint_model is nan"]),
    "constraint function raises": ({"--constraint_funcs": "{tmp}/bad.py:raises"}, ["bad.py:raises raised ValueError"]),
    "reference of another base": ({"--ref_adapter": "{tmp}/other"}, ["ref_adapter", "trained on {tmp}/base"]),
    "no epochs": ({"--num_train_epochs": 0, "--max_steps": -1}, ["num_train_epochs"]),
    "beta of Adam": ({"--adam_beta1": 1}, ["adam_beta1: 1"]),
    "all weights": ({"--no_use_peft": True}, ["use_peft", "--no_use_peft"]),
    "stop text beside a special token": ({"--stop_token": "cat</s>"}, ["stop_token: 'cat</s>' has a special token"]),
    "stop text of bytes that are none": (
        {"--stop_token": "\udcff"}, ["stop_token: not valid Unicode at character 1"],
    ),
    "an answer that is none, in a late row": (
        {"--reward_model_path": "", "--reward_funcs": "exact_answer", "--dataset": "{tmp}/answers.jsonl"},
        ["exact_answer: answer is null, expected text or a number; prompt 'the'"],
    ),
    "empty stop text": ({"--stop_token": ""}, ["stop_token: the text is empty; expected one character or more"]),
    "no such layer": ({"--lora_target_modules": "flux"}, ["lora_target_modules", "flux"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, material: Path) -> Path:
    """Files and folders that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.py").write_text(BAD_FUNCTIONS)
    (folder / "torn.py").write_text("def f(:\n")
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "answers.jsonl", [{"prompt": "a", "answer": "b"}] * 40 + [{"prompt": "the", "answer": None}])
    write_rows(folder / "columns.jsonl", [{"promt": "a"}])
    write_rows(folder / "plain.jsonl", [{"prompt": "a"}, {"prompt": "the"}])
    write_rows(folder / "long.jsonl", [{"prompt": "a"}, {"prompt": "the cat " * 60}])
    for name in ("other", "torn-head", "wide-head", "nan-head", "torn-reward", "wide-reward"):
        shutil.copytree(material / "rm" / "reward", folder / name)
    shutil.copytree(tiny_model, folder / "base")
    change_json(folder / "other" / "adapter_config.json", base_model_name_or_path=str(folder / "base"))
    for file in (folder / "torn-head" / "head.safetensors", folder / "torn-reward" / "adapter_model.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    save_file({"weight": torch.zeros(1, 65), "bias": torch.zeros(1)}, folder / "wide-head" / "head.safetensors")
    save_file({"weight": torch.full((1, 64), math.nan), "bias": torch.zeros(1)}, folder / "nan-head/head.safetensors")
    adapter = folder / "wide-reward" / "adapter_model.safetensors"
    save_file({name: torch.zeros(65, 65) for name in load_file(adapter)}, adapter)
    return folder


def filled(value: Any, places: dict[str, Path]) -> Any:
    """`value` with the paths that its words stand for."""
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    for name, place in places.items():
        value = value.replace(name, str(place)) if isinstance(value, str) else value
    return value


# one refusal each of a setting, of data, of weights and of the startup check; the others end in the same four places
OVER_AN_OLD_RUN = ("gamma above 1", "no prompt column", "reward that is torn", "function raises")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(ppo, tmp_path, tiny_model, material, bad, case):
    places = {"{tmp}": bad, "{m}": material, "{model}": tiny_model}
    changes = {flag: filled(value, places) for flag, value in BAD[case][0].items()}
    before = tree(bad)
    line = error_line(ppo(changes))
    for words in BAD[case][1]:
        assert filled(words, places) in line, line
    assert list(tmp_path.iterdir()) == []
    assert tree(bad) == before
    if case in OVER_AN_OLD_RUN:
        shutil.copytree(material / "old", tmp_path / "old")
        old = tree(tmp_path)
        assert error_line(ppo({**changes, "--output_dir": tmp_path / "old", "--overwrite": True})) == line
        assert tree(tmp_path) == old


def test_an_older_run_is_not_replaced_unasked(ppo, tmp_path, material):
    shutil.copytree(material / "old", tmp_path / "run")
    before = tree(tmp_path)
    assert "holds a run already" in error_line(ppo())
    assert "lam is 0.5 here and 0.95 in" in error_line(ppo({"--lam": 0.5, "--resume": True}))
    assert tree(tmp_path) == before


def test_another_run_is_not_gone_on_with(quick, ppo, tmp_path, material):
    """The same settings, but the prompts' file, or the reward adapter, holds something else by now."""
    shutil.copytree(material / "rm" / "reward", tmp_path / "reward")
    shutil.copy(material / "prompts.jsonl", tmp_path / "prompts.jsonl")
    changes = {"--dataset": tmp_path / "prompts.jsonl", "--reward_model_path": tmp_path / "reward"}
    assert ppo(changes).code == 0
    files = [tmp_path / "prompts.jsonl", tmp_path / "reward" / "head.safetensors"]
    content = [file.read_bytes() for file in files]
    before = tree(tmp_path / "run")
    rows = [json.loads(line) for line in content[0].splitlines()]
    write_rows(files[0], [{**row, "solution": "7"} for row in rows])
    assert "prompts of the run" in error_line(ppo({**changes, "--resume": True}))
    files[0].write_bytes(content[0])
    save_file({"weight": torch.ones(1, 64), "bias": torch.zeros(1)}, files[1])
    assert "the reward model of the run" in error_line(ppo({**changes, "--resume": True}))
    assert tree(tmp_path / "run") == before
    files[1].write_bytes(content[1])
    assert ppo({**changes, "--resume": True}).code == 0


# -------------------------------------------------------------------------------------- startup checks that do not hold


def shift_sampling(patch: pytest.MonkeyPatch, tmp_path: Path, material: Path, tiny_model: Path) -> dict[str, Any]:
    """Tokens are drawn at half the temperature that is asked for."""
    whole = sampler.sample_token

    def colder(logits, *more):
        return whole(logits * 2, *more)

    patch.setattr(sampler, "sample_token", colder)
    return {}


def keep_dropout(patch: pytest.MonkeyPatch, tmp_path: Path, material: Path, tiny_model: Path) -> dict[str, Any]:
    """A model with dropout, which is not turned off when it is loaded."""
    folder = tmp_path / "dropping"
    shutil.copytree(tiny_model, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "attention_dropout": 0.3}))
    patch.setattr(load, "without_dropout", lambda config: config)
    return {"--model": folder}


def shift_training(patch: pytest.MonkeyPatch, tmp_path: Path, material: Path, tiny_model: Path) -> dict[str, Any]:
    """The pass with gradients forgets one thing that the others do."""
    whole = startup.new_logprobs
    patch.setattr(startup, "new_logprobs", lambda roles, episodes, config: whole(roles, episodes, config) + 0.01)
    return {}


def change_reference(patch: pytest.MonkeyPatch, tmp_path: Path, material: Path, tiny_model: Path) -> dict[str, Any]:
    """The policy starts as the SFT adapter, but the reference is the bare base."""

    def loaded(config):
        roles = build.load_ppo_roles(config)
        roles.adapters["reference"] = None
        return roles

    patch.setattr(command, "load_ppo_roles", loaded)
    return {"--model": material / "sft" / "policy"}


BROKEN = {
    "sampling": (shift_sampling, "from sampling and from a pass of the policy"),
    "dropout": (keep_dropout, "has attention dropout 0.3 in training mode, expected 0"),
    "training pass": (shift_training, "in training and in the pass that computes the old ones"),
    "reference": (change_reference, "of the policy and of the reference"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_start_that_does_not_agree_is_refused(ppo, quick, monkeypatch, tmp_path, material, tiny_model, case):
    breaks, expected = BROKEN[case]
    shutil.copytree(material / "old", tmp_path / "old")
    with monkeypatch.context() as patch:
        changes = breaks(patch, tmp_path, material, tiny_model)
        before = tree(tmp_path)
        line = error_line(ppo(changes))
        assert ("startup check" in line) == (case != "dropout")  # which attention itself refuses
        assert expected in line
        error_line(ppo({**changes, "--output_dir": tmp_path / "old", "--overwrite": True}))
        assert tree(tmp_path) == before
    assert ppo(changes).code == 0  # mended, the same settings run
