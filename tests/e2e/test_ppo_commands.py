"""`onecard ppo` end to end on a tiny model: what it writes, and that bad input is one line and leaves nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from onecard import cli, report, rollout
from onecard.algorithms.ppo import command, startup
from onecard.models import build, load

WORDS = ["cat", "dog", "hen", "cow", "fox", "mat"]
STOPS = list("abcdefghijklmnopqrst")  # a random model seldom draws its one EOS; with these, answers end at every length
GOOD = """
def score(completions, **kwargs):
    return [len(set(text)) / 10 for text in completions]

def length(completion_ids, solution):
    return [len(ids) / 7 + int(value) / 100 for ids, value in zip(completion_ids, solution)]

not_a_function = 3
"""
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
    return [[0.0] * len(ids) for ids in completion_ids]

def misspelt(completions, solutoin):
    return [0.0] * len(completions)

def needs_solution(completions, solution):
    return [0.0] * len(completions)
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(settings: dict[str, Any]) -> list[str]:
    """`{"--seed": 3, "--overwrite": True, "--stop_token": ["a", "b"], "--model": None}` as words; None is left out."""
    words = []
    for flag, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            words += [] if one is None else [flag] if one is True else [flag, str(one)]
    return words


def run_command(*words: object) -> None:
    """A command that has to work, from a fixture of the whole module."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert not stop.value.code


def no_report(folder: Path) -> Path:
    """In place of `write_run_report`, whose plots take longer than all the rest."""
    return folder / "report.html"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_run_report", no_report)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with prompts, functions, a reward adapter, an SFT adapter and a finished PPO run."""
    folder = tmp_path_factory.mktemp("material")
    rows = [{"prompt": f"the {WORDS[i % 6]} {'sat on ' * (i % 4)}", "solution": str(i)} for i in range(24)]
    write_rows(folder / "prompts.jsonl", rows)
    (folder / "good.py").write_text(GOOD)
    answers = [(f"the {word} {i}", " good answer", " bad mat") for i in range(4) for word in WORDS]
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in answers]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    small = ["--model", tiny_model, "--max_steps", 4, "--learning_rate", 1e-2, "--test_size", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_run_report", no_report)
        run_command("reward", "--dataset", folder / "pairs.jsonl", "--output_dir", folder / "rm", *small)
        run_command("sft", "--dataset", folder / "sft.jsonl", "--output_dir", folder / "sft", *small)
        run_command("ppo", *flags(settings(tiny_model, folder, folder / "old")))
    return folder


def settings(model: Path, material: Path, output_dir: Path) -> dict[str, Any]:
    """A small run with a reward function: 2 iterations of 8 responses."""
    return {
        "--model": model,
        "--dataset": material / "prompts.jsonl",
        "--output_dir": output_dir,
        "--reward_funcs": f"{material / 'good.py'}:score",
        "--test_size": 4,
        "--batch_size": 8,
        "--per_device_train_batch_size": 4,
        "--num_ppo_epochs": 2,
        "--response_length": 8,
        "--stop_token": STOPS,
        "--learning_rate": 1e-2,
        "--max_steps": 2,
    }


@pytest.fixture
def ppo(onecard, tmp_path, tiny_model, material) -> Callable[..., Any]:
    """`ppo({"--seed": 1})`: the small run in tmp_path/run with other settings."""

    def run(changes: dict[str, Any] | None = None):
        return onecard("ppo", *flags({**settings(tiny_model, material, tmp_path / "run"), **(changes or {})}))

    return run


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training_rows(folder: Path) -> list[dict[str, float]]:
    return [row for row in metrics(folder) if "loss" in row]


def all_finite(folder: Path) -> bool:
    return all(math.isfinite(value) for row in metrics(folder) for value in row.values())


def without_clock(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in metrics(folder)]


def same_policy(first: Path, second: Path) -> bool:
    """Whether two runs' adapters are the same, bit for bit."""
    a, b = (load_file(folder / "policy" / "adapter_model.safetensors") for folder in (first, second))
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def error_line(result: Any) -> str:
    """The one line of a refused command."""
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("onecard: error:")]
    assert len(lines) == 1
    assert result.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.err + result.out
    return lines[0]


# ---------------------------------------------------------------------------------------------- what a good run leaves


def test_a_run_leaves_all_that_it_promises(onecard, ppo, monkeypatch, tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    assert ppo().code == 0
    rows, evaluated = training_rows(run), [row for row in metrics(run) if "eval_objective/scores" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["episode"] for row in rows] == [8, 16]
    assert [row["step"] for row in evaluated] == [0, 2]
    assert evaluated[0]["eval_objective/kl"] == 0.0
    assert all_finite(run)
    assert all(row["rewards/score/mean"] == row["objective/scores"] for row in rows)
    assert all(row["policy/updates"] == 4 for row in rows)
    assert all(0 < row["completions/clipped_ratio"] < 1 for row in rows)  # some answers end, some are cut

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0] * 4 + [2] * 4
    assert samples[0]["prompt"] == samples[4]["prompt"]
    page = (run / "report.html").read_text()
    assert samples[0]["prompt"].strip() in page
    assert "before" in page
    assert "after" in page
    assert (run / "plots" / "kl.png").is_file()

    ids = AutoTokenizer.from_pretrained(run / "policy")("the cat", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, str(run / "policy"))(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3

    monkeypatch.setattr(report, "write_run_report", no_report)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["batch_size"], saved["stop_token"], saved["model"]) == (8, STOPS, str(tiny_model))
    again = onecard("ppo", "--config", run / "config.yaml", "--output_dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert without_clock(tmp_path / "again") == without_clock(run)
    assert same_policy(tmp_path / "again", run)


@pytest.mark.parametrize("start", ["base", "SFT adapter"])
def test_the_first_minibatch_has_ratio_1_and_no_kl(quick, ppo, tmp_path, material, start):
    """One epoch and one minibatch (of two micro-batches): nothing has moved yet when its metrics are taken."""
    model = {"--model": material / "sft" / "policy"} if start == "SFT adapter" else {}
    result = ppo({**model, "--num_ppo_epochs": 1, "--gradient_accumulation_steps": 2})
    assert result.code == 0, result.err
    first, second = training_rows(tmp_path / "run")
    assert first["policy/updates"] == 1
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-10)
    assert first["policy/clipfrac_avg"] == 0.0
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(second["objective/kl"]) > 1e-3  # and then it has


def test_a_reward_adapter_judges(quick, ppo, tmp_path, material):
    result = ppo({"--reward_funcs": None, "--reward_model_path": material / "rm" / "reward"})
    assert result.code == 0, result.err
    assert all_finite(tmp_path / "run")
    for row in training_rows(tmp_path / "run"):
        assert row["objective/scores"] == row["rewards/reward_model/mean"] != 0.0
    assert (tmp_path / "run" / "checkpoint-2" / "value" / "head.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoint-2" / "reward").exists()  # frozen: it is where it was


def test_scores_are_the_weighted_sum_less_the_penalty(quick, ppo, tmp_path, material):
    functions = [f"{material / 'good.py'}:score", f"{material / 'good.py'}:length"]
    result = ppo(
        {"--reward_model_path": material / "rm" / "reward", "--reward_funcs": functions,
         "--reward_weights": [0.5, 2, -3], "--missing_eos_penalty": 0.25}
    )  # fmt: skip
    assert result.code == 0, result.err
    for row in metrics(tmp_path / "run"):
        start = "" if "loss" in row else "eval_"
        parts = [row[f"{start}rewards/{name}/mean"] for name in ("reward_model", "score", "length")]
        expected = 0.5 * parts[0] + 2 * parts[1] - 3 * parts[2] - 0.25 * row[f"{start}completions/clipped_ratio"]
        assert row[f"{start}objective/scores"] == pytest.approx(expected, abs=1e-5)
        assert all(part != 0 for part in parts)


def test_4_bit_checkpointing_and_paged_8_bit_adam(quick, ppo, tmp_path):
    more = {"--load_in_4bit": True, "--gradient_checkpointing": True, "--optim": "paged_adamw_8bit", "--lora_r": 64}
    result = ppo(more)
    assert result.code == 0, result.err
    assert all_finite(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in training_rows(tmp_path / "run"))


def test_bad_rows_are_skipped_and_counted(quick, ppo, tmp_path):
    rows = [{"prompt": "the cat"}, {"prompt": "a cat " * 80}, *({"prompt": f"a {word}"} for word in WORDS)]
    bad = write_rows(tmp_path / "some.jsonl", [*rows, {"prompt": None}])
    refused = error_line(ppo({"--dataset": bad}))
    assert "some.jsonl:2: prompt:" in refused
    assert "expected at most 120 beside the response" in refused
    assert not (tmp_path / "run").exists()
    result = ppo({"--dataset": bad, "--skip_bad_rows": True})
    assert result.code == 0, result.err
    assert "2 of 9 rows are bad and were skipped" in result.err
    assert "some.jsonl:9: prompt is null" in result.err
    assert "3 examples to train on, 4 held out" in result.err


def test_a_column_that_only_some_rows_have_is_none_elsewhere(quick, ppo, tmp_path):
    """Even in an iteration whose rows all lack it."""
    rows = [{"prompt": f"the {WORDS[i % 6]} {i}", **({"solution": "3"} if i == 0 else {})} for i in range(24)]
    (tmp_path / "f.py").write_text("def f(completions, solution):\n    return [float(s or 1) for s in solution]\n")
    result = ppo({"--dataset": write_rows(tmp_path / "some.jsonl", rows), "--reward_funcs": f"{tmp_path / 'f.py'}:f"})
    assert result.code == 0, result.err


# --------------------------------------------------------------------------------------------------------- bad input

# settings that are changed ({m}: the material's folder, {tmp}: the test's), and what the line has to say
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "function raises": ({"--reward_funcs": "{tmp}/bad.py:raises"}, ["bad.py:raises raised ValueError: two lines"]),
    "function exits": ({"--reward_funcs": "{tmp}/bad.py:exits"}, ["bad.py:exits raised SystemExit"]),
    "function gives NaN": ({"--reward_funcs": "{tmp}/bad.py:nan"}, ["bad.py:nan returned nan", "prompt", "response"]),
    "function gives None": ({"--reward_funcs": "{tmp}/bad.py:none"}, ["bad.py:none returned None"]),
    "function gives too few": ({"--reward_funcs": "{tmp}/bad.py:few"}, ["bad.py:few returned a list of 1", "of 8"]),
    "dense rewards": ({"--reward_funcs": "{tmp}/bad.py:dense"}, ["bad.py:dense returned", "per token"]),
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
    "no reward at all": ({"--reward_funcs": None}, ["--reward_model_path or --reward_funcs is missing"]),
    "weights of another count": ({"--reward_weights": [1, 2]}, ["reward_weights: 2 given (1, 2), expected 1"]),
    "no prompts": ({"--dataset": "{tmp}/empty.jsonl"}, ["empty.jsonl: the file is empty"]),
    "no prompt column": (
        {"--dataset": "{tmp}/columns.jsonl"}, ["columns.jsonl:1: no column 'prompt'", "there are promt", "'promt'?"],
    ),
    "no dataset": ({"--dataset": None}, ["--dataset is missing"]),
    "no prompt left to train on": ({"--test_size": 24}, ["test_size"]),
    "prompt too long": ({"--dataset": "{tmp}/long.jsonl"}, ["long.jsonl:2: prompt:", "at most 120 beside"]),
    "response past the context": ({"--response_length": 128}, ["response_length: 128 leaves no room", "128 tokens"]),
    "response past max_length": ({"--max_length": 8}, ["response_length: 8", "max_length (8)"]),
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
        {"--reward_model_path": "{tmp}/wide-reward"}, ["reward_model_path:", "wide-reward:", "size mismatch"],
    ),
    "reward that scores NaN": ({"--reward_model_path": "{tmp}/nan-head"}, ["reward_model is nan"]),
    "minibatch above batch_size": ({"--batch_size": 2}, ["batch_size: 2", "minibatch", "= 4"]),
    "batch_size no multiple": ({"--batch_size": 6}, ["batch_size: 6 is no multiple", "= 4"]),
    "num_generations does not divide": ({"--num_generations": 3}, ["num_generations: 3", "8 responses"]),
    "temperature 0": ({"--temperature": 0}, ["temperature: 0, expected above 0"]),
    "dual_clip below 1": ({"--dual_clip": 0.5}, ["dual_clip: 0.5, expected above 1"]),
    "cliprange 0": ({"--cliprange": 0}, ["cliprange: 0"]),
    "gamma above 1": ({"--gamma": 1.5}, ["gamma: 1.5, expected 0 to 1"]),
    "lam above 1": ({"--lam": 1.5}, ["lam: 1.5, expected 0 to 1"]),
    "KL target 0": ({"--adap_kl_ctrl": True, "--adap_kl_target": 0}, ["adap_kl_target: 0"]),
    "no epochs": ({"--num_train_epochs": 0, "--max_steps": -1}, ["num_train_epochs"]),
    "beta of Adam": ({"--adam_beta1": 1}, ["adam_beta1: 1"]),
    "all weights": ({"--no_use_peft": True}, ["use_peft", "--no_use_peft"]),
    "stop text of several tokens": ({"--stop_token": "cat on"}, ["stop_token: 'cat on' is", "one token"]),
    "no such layer": ({"--lora_target_modules": "flux"}, ["lora_target_modules", "flux"]),
}  # fmt: skip


@pytest.fixture
def bad_material(tmp_path: Path, tiny_model: Path, material: Path) -> None:
    """Files and folders that cannot be used, in tmp_path."""
    (tmp_path / "bad.py").write_text(BAD_FUNCTIONS)
    (tmp_path / "torn.py").write_text("def f(:\n")
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "columns.jsonl", [{"promt": "a"}])
    write_rows(tmp_path / "plain.jsonl", [{"prompt": "a"}, {"prompt": "the"}])
    write_rows(tmp_path / "long.jsonl", [{"prompt": "a"}, {"prompt": "the cat " * 60}])
    for name in ("other", "torn-head", "wide-head", "nan-head", "torn-reward", "wide-reward"):
        shutil.copytree(material / "rm" / "reward", tmp_path / name)
    shutil.copytree(tiny_model, tmp_path / "base")
    described = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(described))
    for file in (tmp_path / "torn-head" / "head.safetensors", tmp_path / "torn-reward" / "adapter_model.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    save_file({"weight": torch.zeros(1, 65), "bias": torch.zeros(1)}, tmp_path / "wide-head" / "head.safetensors")
    save_file({"weight": torch.full((1, 64), math.nan), "bias": torch.zeros(1)}, tmp_path / "nan-head/head.safetensors")
    adapter = tmp_path / "wide-reward" / "adapter_model.safetensors"
    save_file({name: torch.zeros(65, 65) for name in load_file(adapter)}, adapter)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(ppo, tmp_path, tiny_model, material, bad_material, case):
    changes, expected = BAD[case]

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        places = {"{tmp}": tmp_path, "{m}": material, "{model}": tiny_model}
        for name, place in places.items():
            value = value.replace(name, str(place)) if isinstance(value, str) else value
        return value

    changes = {flag: filled(value) for flag, value in changes.items()}
    shutil.copytree(material / "old", tmp_path / "old")
    before = tree(tmp_path)
    line = error_line(ppo(changes))
    for words in expected:
        assert filled(words) in line, line
    assert tree(tmp_path) == before
    assert error_line(ppo({**changes, "--output_dir": tmp_path / "old", "--overwrite": True})) == line
    assert tree(tmp_path) == before


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
    whole = rollout.draw

    def colder(logits, sampling, filters):
        return whole(logits * 2, sampling, filters)

    patch.setattr(rollout, "draw", colder)
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
    "sampling": (shift_sampling, "as drawn and of the policy's own pass"),
    "dropout": (keep_dropout, "in training and in the pass before it"),
    "training pass": (shift_training, "in training and in the pass before it"),
    "reference": (change_reference, "of the policy and of the reference"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_start_that_does_not_agree_is_refused(ppo, monkeypatch, tmp_path, material, tiny_model, case):
    breaks, expected = BROKEN[case]
    shutil.copytree(material / "old", tmp_path / "old")
    with monkeypatch.context() as patch:
        changes = breaks(patch, tmp_path, material, tiny_model)
        before = tree(tmp_path)
        line = error_line(ppo(changes))
        assert "startup check" in line
        assert expected in line
        error_line(ppo({**changes, "--output_dir": tmp_path / "old", "--overwrite": True}))
        assert tree(tmp_path) == before
    monkeypatch.setattr(report, "write_run_report", no_report)
    assert ppo(changes).code == 0  # mended, the same settings run


def test_a_function_that_fails_later_leaves_the_last_checkpoint_to_go_on_from(quick, ppo, tmp_path):
    mended = "def f(completions, **kwargs):\n    return [len(set(text)) / 10 for text in completions]\n"
    breaking = (
        "calls = []\n"
        "def f(completions, **kwargs):\n"
        "    calls.append(1)\n"
        # two calls of the startup check, the first evaluation, then one an iteration: the fifth iteration's fails
        "    if len(calls) == 8:\n"
        "        raise ConnectionError('no answer')\n"
        "    return [len(set(text)) / 10 for text in completions]\n"
    )
    function = tmp_path / "f.py"
    more = {"--reward_funcs": f"{function}:f", "--max_steps": 6, "--save_steps": 2}
    function.write_text(mended)
    assert ppo({**more, "--output_dir": tmp_path / "whole"}).code == 0
    function.write_text(breaking)
    assert "f.py:f raised ConnectionError: no answer" in error_line(ppo(more))
    assert [row["step"] for row in training_rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "run").glob("*check*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "run" / "policy").exists()
    function.write_text(mended)
    resumed = ppo({**more, "--resume": True})
    assert resumed.code == 0, resumed.err
    assert "going on from" in resumed.err
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "whole")
    assert same_policy(tmp_path / "run", tmp_path / "whole")
