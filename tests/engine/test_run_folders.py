"""A run folder in place of the weights in it, wherever a model or an adapter is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from onecard.config import DPOConfig, RewardConfig
from onecard.models.build import load_roles
from onecard.models.load import Source, find_source, load_tokenizer
from tests.e2e.ppo_material import error_line, tree


@pytest.fixture
def run(tmp_path, tiny_model) -> Path:
    """A finished run with an adapter, and a folder of a run that has not got so far."""
    config = DPOConfig(model=str(tiny_model))
    load_roles(config, trained="policy").export("policy", tmp_path / "run" / "policy", load_tokenizer(config))
    for folder in ("run", "begun"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.yaml").write_text("model: m\n")
    return tmp_path / "run"


def test_a_run_folder_stands_for_its_adapter_or_model(run, tiny_model):
    assert find_source(str(run)) == Source(str(tiny_model), run / "policy")
    shutil.rmtree(run / "policy")
    shutil.copytree(tiny_model, run / "policy")
    assert find_source(str(run)) == Source(str(run / "policy"))


def test_a_reward_run_stands_for_its_reward_model(tmp_path, tiny_model):
    config = RewardConfig(model=str(tiny_model))
    roles = load_roles(config, trained="reward", scalar=True)
    roles.export("reward", tmp_path / "rm" / "reward", load_tokenizer(config))
    assert find_source(str(tmp_path / "rm")).adapter == tmp_path / "rm" / "reward"


def test_generate_says_the_same_from_the_run_and_from_its_policy(run, onecard):
    words = ["--prompt", "the cat", "--max_new_tokens", 6]
    alike = [onecard("generate", "--model", folder, *words).out for folder in (run, run / "policy")]
    assert alike[0] == alike[1] != ""


@pytest.mark.parametrize("command", ["chat", "generate", "merge", "evaluate"])
def test_a_run_that_has_not_finished_is_named(run, onecard, command):
    message = "has neither config.json nor adapter_config.json, nor policy or reward, which a run writes at its end"
    words = {"generate": ["--prompt", "a"], "evaluate": ["--dataset", "rows.jsonl"]}.get(command, [])
    assert message in error_line(onecard(command, "--model", run.parent / "begun", *words))


def test_a_reward_run_writes_no_texts(tmp_path, tiny_model, onecard):
    config = RewardConfig(model=str(tiny_model))
    roles = load_roles(config, trained="reward", scalar=True)
    roles.export("reward", tmp_path / "rm" / "reward", load_tokenizer(config))
    result = onecard("generate", "--model", tmp_path / "rm", "--prompt", "a", "--max_new_tokens", 4)
    assert "is a reward model; expected a language model" in error_line(result)


def test_a_run_is_not_replaced_by_one_that_starts_from_it(run, onecard):
    """Its policy would be gone before it is copied."""
    (run.parent / "rows.jsonl").write_text("".join(json.dumps({"text": f"the cat {n}"}) + "\n" for n in range(6)))
    before = tree(run)
    words = ["--dataset", run.parent / "rows.jsonl", "--output_dir", run, "--overwrite", "--max_steps", 1]
    for model in (run, run / "policy"):
        assert "is part of the run in" in error_line(onecard("sft", "--model", model, *words))
    assert tree(run) == before
