"""`onecard merge`: the plain model says what base and adapter said together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.config import DPOConfig, ModelConfig, RewardConfig
from onecard.models.build import load_frozen_role, load_roles
from onecard.models.load import load_tokenizer
from tests.e2e.ppo_material import error_line
from tests.engine.weights_material import by_folder, by_transformers, random_adapter

pytestmark = pytest.mark.usefixtures("quick")


def adapter(base: Path, folder: Path, **settings) -> Path:
    """A run's folder."""
    return random_adapter(base, folder / "policy", **settings).parent


def one_pass_logprobs(model: Path) -> torch.Tensor:
    """By transformers alone."""
    return by_transformers(AutoModelForCausalLM.from_pretrained(model))


@pytest.mark.parametrize("layers", [["all-linear"], ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_the_merged_model_gives_the_adapters_logprobs(onecard, tmp_path, tinystories, layers):
    """On a base whose head is its embeddings: with an adapter on either, the merged model has two of them."""
    run = adapter(tinystories, tmp_path / "run", lora_target_modules=layers)
    expected = by_folder(run)
    assert (expected - by_folder(tinystories)).abs().max() > 0.1
    result = onecard("merge", "--model", run, "--output_dir", tmp_path / "merged")
    assert result.code == 0, result.err
    # Sums of 128 products, of which those with the adapter are rounded once more or once less.
    torch.testing.assert_close(by_folder(tmp_path / "merged"), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(one_pass_logprobs(tmp_path / "merged"), expected, atol=2e-5, rtol=0)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["tie_word_embeddings"] == (layers == ["all-linear"])
    assert {"tokenizer.json", "generation_config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "merged").iterdir()
    }


def test_a_4bit_run_s_adapter_is_merged_into_the_stored_base(onecard, tmp_path, tinystories):
    run = adapter(tinystories, tmp_path / "run", load_in_4bit=True)
    assert onecard("merge", "--model", run, "--output_dir", tmp_path / "merged").code == 0
    torch.testing.assert_close(one_pass_logprobs(tmp_path / "merged"), by_folder(run), atol=2e-5, rtol=0)


def test_dtype_is_that_of_the_files(onecard, tmp_path, tiny_model):
    from safetensors.torch import load_file

    run = adapter(tiny_model, tmp_path / "run")
    result = onecard("merge", "--model", run, "--output_dir", tmp_path / "merged", "--dtype", "bfloat16")
    assert "bfloat16" in result.err
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.fixture
def dropping(tmp_path, tiny_model) -> Path:
    """The tiny model with dropout in its config."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "dropping"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.25}))
    return folder


def test_a_written_model_keeps_the_dropout_that_it_came_with(onecard, tmp_path, dropping):
    """Training runs without; who fine-tunes the written model elsewhere gets the model's own setting."""
    onecard("merge", "--model", adapter(dropping, tmp_path / "run"), "--output_dir", tmp_path / "merged")
    config = DPOConfig(model=str(dropping), use_peft=False)
    roles = load_roles(config, trained="policy")
    roles.export("policy", tmp_path / "whole", load_tokenizer(config))
    assert roles.model.config.attention_dropout == 0.0
    for folder in ("merged", "whole"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["attention_dropout"] == 0.25
        assert (
            load_frozen_role(ModelConfig(model=str(tmp_path / folder)), role="policy").model.config.attention_dropout
            == 0
        )


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(onecard, tmp_path, tiny_model):
    run = adapter(tiny_model, tmp_path / "run")
    config = RewardConfig(model=str(tiny_model))
    load_roles(config, trained="reward", scalar=True).export("reward", tmp_path / "rm", load_tokenizer(config))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    bad = {
        "is a full model, expected an adapter": ["--model", tiny_model],
        "is a reward adapter. Its scalar head has a bias": ["--model", tmp_path / "rm"],
        "load_in_4bit": ["--model", run, "--load_in_4bit"],
        "has 'notes.txt' in it, expected a new or an empty folder": ["--model", run, "--output_dir", tmp_path / "full"],
        "has a training run in it": ["--model", run, "--output_dir", tmp_path / "trained"],
        "--output_dir is missing": ["--model", run, "--output_dir", ""],
    }
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.yaml").write_text("model: m\n")
    for message, words in bad.items():
        result = onecard("merge", "--output_dir", tmp_path / "merged", *words)
        assert message in error_line(result)
        assert not (tmp_path / "merged").exists()
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_failed_write_leaves_no_folder(onecard, tmp_path, tiny_model, monkeypatch):
    from onecard.commands import merge

    def torn(model, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(merge, "save_model", torn)
    result = onecard("merge", "--model", adapter(tiny_model, tmp_path / "run"), "--output_dir", tmp_path / "merged")
    assert "No space left" in error_line(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_stored_quantized_base_is_refused(onecard, tmp_path, tiny_model, monkeypatch):
    from onecard.commands import merge

    run = adapter(tiny_model, tmp_path / "run")
    loaded = load_frozen_role(ModelConfig(model=str(tiny_model), load_in_4bit=True), role="policy").model
    monkeypatch.setattr(merge, "load_base", lambda config: loaded)
    result = onecard("merge", "--model", run, "--output_dir", tmp_path / "merged")
    assert "has quantized weights" in error_line(result)
