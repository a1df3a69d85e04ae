"""The base: its class, whether its files hold what its config says, and which leftovers do no harm."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from onecard.commands import merge
from onecard.config import MergeConfig, ModelConfig, SFTConfig
from onecard.models.build import load_roles
from onecard.models.load import load_base, load_report
from onecard.training.startup import check_model
from onecard.utils.errors import OnecardError
from tests.engine.weights_material import TOKENS, by_folder, by_role, by_transformers
from tests.models.families import FAMILIES, random_model


@pytest.fixture
def copied(tmp_path, tiny_model) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_tensor_of_another_shape_is_refused(copied, four_bit):
    """transformers takes any shape where it quantizes."""
    key = "model.layers.1.self_attn.o_proj.weight"
    change_weights(copied, lambda found: {**found, key: found[key][:60].clone()})
    with pytest.raises(OnecardError, match=rf"{key} is \[60, 64\].*expected \[64, 64\]"):
        load_base(ModelConfig(model=str(copied), load_in_4bit=four_bit))


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_missing_expert_is_refused(tmp_path, four_bit):
    """One of four: those that are there would be stacked."""
    random_model(FAMILIES["qwen3_moe"]).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda found: {name: each for name, each in found.items() if ".experts.3." not in name})
    with pytest.raises(OnecardError, match=r"experts.(gate_up|down)_proj is \[3, .*expected \[4, "):
        load_base(ModelConfig(model=str(tmp_path), load_in_4bit=four_bit))


def test_an_expert_that_lacks_a_matrix_is_refused(tmp_path, caplog):
    """transformers stacks a matrix of each expert and names no tensor where that fails, but in its log."""
    caplog.set_level(logging.ERROR, logger="transformers")
    random_model(FAMILIES["qwen3_moe"]).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda found: {name: each for name, each in found.items() if ".3.gate_proj" not in name})
    with pytest.raises(OnecardError, match=r"lacks parts of .*experts.gate_up_proj.*, or their shapes differ"):
        load_base(ModelConfig(model=str(tmp_path)))
    random_model(FAMILIES["qwen3_moe"]).save_pretrained(tmp_path / "whole")
    load_base(ModelConfig(model=str(tmp_path / "whole")))
    assert load_report.unconverted == ()


@pytest.mark.parametrize("key", ["model.layers.1.self_attn.o_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_weights_that_are_not_finite_are_refused(copied, key, four_bit):
    change_weights(copied, lambda found: {**found, key: found[key].index_fill(-1, torch.tensor([7]), torch.nan)})
    with pytest.raises(OnecardError, match=rf"has weights that are NaN or infinite: {key}\.$"):
        load_base(ModelConfig(model=str(copied), load_in_4bit=four_bit))


@pytest.mark.parametrize("family", ["gpt2", "falcon", "mamba2", "jamba", "gemma3n_text", "zamba2", "laguna"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_never_refused(tmp_path, family, tied):
    """Tied heads, buffers, renamed and stacked weights."""
    model = random_model(FAMILIES[family])
    model.config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path)
    load_base(ModelConfig(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "llama4", "qwen3_vl"])
def test_a_vision_language_model_stays_one(tmp_path, tiny_model, name):
    """Its text decoder is trained; adapter and merged model load as the class that the checkpoint is."""
    from peft import PeftModel

    base, adapter = tmp_path / "base", tmp_path / "policy"
    random_model(FAMILIES[name]).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    roles = load_roles(SFTConfig(model=str(base)), trained="policy")
    kind = type(roles.causal_model()).__name__
    assert kind == json.loads((base / "config.json").read_text())["architectures"][0]
    assert not [key for key in roles.trained_parameters() if "vis" in key.rpartition("language_model")[0]]
    check_model(roles, len(TOKENS))  # that each adapter learns, among other things
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    truth = by_role(roles)
    roles.export("policy", adapter, AutoTokenizer.from_pretrained(base))
    theirs = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    torch.testing.assert_close(by_transformers(theirs), truth, atol=5e-5, rtol=0)
    merge.run(MergeConfig(model=str(adapter), output_dir=str(tmp_path / "merged")))
    merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert type(merged).__name__ == kind
    assert not any(info.values())
    torch.testing.assert_close(by_transformers(merged), truth, atol=2e-4, rtol=0)
    torch.testing.assert_close(by_folder(adapter), truth)


def test_a_placeholder_of_an_image_is_refused(tmp_path, tiny_model):
    """A text model would read it as a word; the whole model replaces it."""
    from onecard.models.vocabulary import check_tokens

    model, tokenizer = random_model(FAMILIES["llama4"]), AutoTokenizer.from_pretrained(tiny_model)
    check_tokens(model, tokenizer, [(5, 298)])
    with pytest.raises(OnecardError, match=r"in the data stands for image input; expected text alone"):
        check_tokens(model, tokenizer, [(5, 299)])


def test_layers_with_one_weight_are_not_merged(tmp_path, tiny_model):
    """Zamba 2 runs one transformer in several layers; each may learn its own adapter, but there is one weight to take
    it in.
    """
    random_model(FAMILIES["zamba2"]).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    load_roles(SFTConfig(model=str(tmp_path / "base")), trained="policy").write("policy", tmp_path / "policy")
    config = MergeConfig(model=str(tmp_path / "policy"), output_dir=str(tmp_path / "merged"))
    with pytest.raises(OnecardError, match=r"q_proj.weight, which shares its weights with .*; a plain model"):
        merge.run(config)
    assert not (tmp_path / "merged").exists()
