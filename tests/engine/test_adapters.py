"""Adapters read and written: every tensor of the file is in the model, and PEFT computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from onecard.config import ModelConfig, PPOConfig, SFTConfig
from onecard.models.adapters import adapter_tensors
from onecard.models.build import load_frozen_roles, load_ppo_roles, load_roles
from onecard.utils.errors import OnecardError
from tests.engine.weights_material import by_role, by_transformers
from tests.models.families import FAMILIES, random_model

Q, V = "q_proj", "v_proj"
KINDS: dict[str, dict] = {
    "rank-stabilized": {"target_modules": [Q, V], "use_rslora": True},
    "ranks and scales of layers": {
        "target_modules": [Q, V], "rank_pattern": {"layers.0.self_attn.q_proj": 7}, "alpha_pattern": {V: 3},
    },
    "some layers": {"target_modules": [Q, V], "layers_to_transform": [1]},
    "pattern": {"target_modules": r".*layers\.0.*q_proj"},
    "excluded": {"target_modules": [Q, V], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "DoRA": {"target_modules": [Q, "embed_tokens"], "use_dora": True},
    "biases of its own": {"target_modules": [Q, "lm_head"], "lora_bias": True},
    "whole head": {"target_modules": [Q], "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": [Q], "modules_to_save": ["embed_tokens"]},
    "whole norms": {"target_modules": [Q], "modules_to_save": ["norm"]},
    "gaussian, dropout": {"target_modules": [Q], "init_lora_weights": "gaussian", "lora_dropout": 0.5},
}  # fmt: skip


def made_by_peft(base: Path, folder: Path, **settings) -> PeftModel:
    """An adapter of PEFT's with random weights, saved in `folder`."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def close(found: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(found, truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_s_adapters_compute_what_they_do_there(tmp_path, tinystories, kind):
    """Switched on, off to exactly the base, and on again; as a second adapter; and written anew for PEFT."""
    model = made_by_peft(tinystories, tmp_path / "theirs", **KINDS[kind])
    truth, base = by_transformers(model), by_transformers(AutoModelForCausalLM.from_pretrained(tinystories))
    assert (truth - base).abs().max() > 0.05
    config = ModelConfig(model=str(tmp_path / "theirs"))
    roles = load_frozen_roles(config, {"policy": tmp_path / "theirs", "reference": None})
    for _ in range(2):
        close(by_role(roles, "policy"), truth)
        close(by_role(roles, "reference"), base)
    made_by_peft(tinystories, tmp_path / "plain", target_modules=["o_proj"])
    second = load_frozen_roles(config, {"policy": tmp_path / "plain", "other": tmp_path / "theirs"})
    before = by_role(second, "policy")
    close(by_role(second, "other"), truth)
    assert torch.equal(by_role(second, "policy"), before)
    load_roles(SFTConfig(model=str(tmp_path / "theirs")), trained="policy").write("policy", tmp_path / "ours")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tinystories), tmp_path / "ours")
    assert torch.equal(by_transformers(again), truth)


@pytest.mark.parametrize("settings", [{"target_modules": [Q, "lm_head"], "use_dora": True}])
def test_a_variant_on_the_head_is_refused(tmp_path, tinystories, settings):
    made_by_peft(tinystories, tmp_path, **settings)
    with pytest.raises(OnecardError, match="has DoraLinearVariant on the head; expected plain LoRA there"):
        load_frozen_roles(ModelConfig(model=str(tmp_path)), {"policy": tmp_path})


def test_pickled_weights_are_read_too(tmp_path, tinystories):
    truth = by_transformers(made_by_peft(tinystories, tmp_path, target_modules=[Q]))
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    close(by_role(load_frozen_roles(ModelConfig(model=str(tmp_path)), {"policy": tmp_path}), "policy"), truth)


def test_copies_of_the_base_s_weights_are_no_part_of_an_adapter(tmp_path, tinystories):
    """PEFT writes them where the embeddings or the head are adapted."""
    truth = by_transformers(made_by_peft(tinystories, tmp_path, target_modules=[Q, "lm_head"]))
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    close(by_role(load_frozen_roles(ModelConfig(model=str(tmp_path)), {"policy": tmp_path}), "policy"), truth)


def shaken(roles, role: str = "policy"):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in roles.trained_parameters().items():
            if f".{role}." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return roles


# families whose shared experts' names PEFT would take for all experts', and one whose keys it would rename
@pytest.mark.parametrize("family", ["qwen2_moe", "laguna", "deepseek_v3", "qwen3_5_moe_text", "mixtral"])
@pytest.mark.parametrize("layers", [["all-linear"], ["all-linear", "experts.gate_up_proj", "experts.down_proj"]])
def test_adapters_of_mixtures_come_back_here_and_in_peft(tmp_path, family, layers):
    random_model(FAMILIES[family]).save_pretrained(tmp_path / "base")
    config = SFTConfig(model=str(tmp_path / "base"), lora_target_modules=layers, lora_r=4)
    roles = shaken(load_roles(config, trained="policy"))
    roles.save(tmp_path / "checkpoint")
    roles.write("policy", tmp_path / "policy")
    tensors, truth = adapter_tensors(roles.model, "policy"), by_role(roles, "policy")
    assert len(layers) == 1 or any(".experts." in name for name in tensors)

    read = load_frozen_roles(
        ModelConfig(model=str(tmp_path / "policy"), dtype="float32"), {"policy": tmp_path / "policy"}
    )
    back = adapter_tensors(read.model, "policy")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(by_role(read, "policy"), truth)

    restored = load_roles(config, trained="policy")
    restored.restore(tmp_path / "checkpoint")
    assert torch.equal(by_role(restored, "policy"), truth)

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "policy")
    close(by_transformers(theirs), truth)


def test_a_layer_that_is_called_as_a_role_is_written_too(tmp_path):
    """RWKV's attention has a layer `value`, and PPO an adapter of that name, whose tensors PEFT would leave out."""
    random_model(FAMILIES["rwkv"]).save_pretrained(tmp_path / "base")
    roles = shaken(load_ppo_roles(PPOConfig(model=str(tmp_path / "base"), reward_funcs=["length:8"])))
    roles.write("policy", tmp_path / "policy")
    truth = by_role(roles, "policy")
    read = load_frozen_roles(ModelConfig(model=str(tmp_path / "policy")), {"policy": tmp_path / "policy"})
    assert sum("attention.value.lora_" in name for name in adapter_tensors(read.model, "policy")) == 6
    assert torch.equal(by_role(read, "policy"), truth)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path, tiny_model):
    roles = load_roles(SFTConfig(model=str(tiny_model)), trained="policy")
    roles.save(tmp_path)
    path = tmp_path / "policy" / "adapter_model.safetensors"
    weights = load_file(path)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({name: each for name, each in weights.items() if name != key}, path)
    before = {name: each.clone() for name, each in roles.trained_parameters().items()}
    with pytest.raises(OnecardError, match=f"it has no {key}"):
        roles.restore(tmp_path)
    assert all(torch.equal(each, before[name]) for name, each in roles.trained_parameters().items())


def test_the_written_config_names_few_layers(tmp_path, tiny_model):
    """PEFT makes the list of full names short."""
    load_roles(SFTConfig(model=str(tiny_model)), trained="policy").write("policy", tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(settings["target_modules"]) <= 14
    assert settings["base_model_name_or_path"] == str(tiny_model)
