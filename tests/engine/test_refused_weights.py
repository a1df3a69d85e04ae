"""Checkpoints and adapters that would load without an error and compute something else; they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.commands import merge
from onecard.config import DPOConfig, MergeConfig, ModelConfig, RewardConfig, SFTConfig
from onecard.models.build import load_frozen_role, load_roles
from onecard.models.load import Source, load_base
from onecard.training.startup import check_model
from onecard.utils.errors import OnecardError
from tests.models.families import FAMILIES, random_model


def written(family: str, folder: Path, tokenizer: Path) -> Path:
    """A tiny model of a family as a folder."""
    random_model(FAMILIES[family]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def adapter_on(base: Path, folder: Path, **settings) -> Path:
    """A PEFT adapter with random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, init_lora_weights=False, **settings)
    )
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=(torch.arange(40) * 7 + 3)[None], use_cache=False).logits[0]


def test_router_jitter_is_left_to_the_model(tmp_path, tiny_model):
    """PhiMoE routes by it in evaluation mode too."""
    base = written("phimoe", tmp_path / "base", tiny_model)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "router_jitter_noise": 0.1}))
    theirs = logits(AutoModelForCausalLM.from_pretrained(base))
    (base / "config.json").write_text(json.dumps({**config, "router_jitter_noise": 0.0}))
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), theirs, atol=0.1)
    (base / "config.json").write_text(json.dumps({**config, "router_jitter_noise": 0.1}))
    torch.testing.assert_close(logits(load_base(ModelConfig(model=str(base)))), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["jamba", "mamba"])
def test_an_adapter_that_acts_on_nothing_is_not_merged(tmp_path, tiny_model, family):
    """Mamba multiplies with dt_proj's weight and does not call the layer."""
    base = written(family, tmp_path / "base", tiny_model)
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=["dt_proj"])
    with pytest.raises(OnecardError, match=r"log-probs of the merged model are off by .* nat .*\(Mamba's dt_proj\)"):
        merge.run(MergeConfig(model=str(adapter), output_dir=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()
    other = adapter_on(base, tmp_path / "other", target_modules=["in_proj"])
    merge.run(MergeConfig(model=str(other), output_dir=str(tmp_path / "merged")))


def test_an_adapter_that_the_model_would_not_rescale_is_refused(tmp_path, tiny_model):
    """RWKV divides weights in evaluation mode, and PEFT's adapters beside them not."""
    base = written("rwkv", tmp_path / "base", tiny_model)
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=["output"])
    with pytest.raises(OnecardError, match="output, whose weights the model rescales in evaluation mode"):
        load_frozen_role(ModelConfig(model=str(adapter)), role="policy")


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gpt_neo", "transformer.h.0.attn.attention.masked_bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("gptj", "transformer.h.1.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("codegen", "transformer.h.0.attn.causal_mask"),
        ("opt", "model.decoder.version"),
        ("llama", "model.rotary_emb.inv_freq"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_buffers_of_earlier_versions_do_no_harm(tmp_path, tiny_model, family, key):
    base = written(family, tmp_path / "base", tiny_model)
    theirs = logits(AutoModelForCausalLM.from_pretrained(base))
    weights = load_file(base / "model.safetensors")
    save_file({**weights, key: torch.ones(1, 1, 8, 8)}, base / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(load_base(ModelConfig(model=str(base)))), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.attn.weight"])
def test_weights_that_are_left_over_are_refused(tmp_path, tiny_model, key):
    base = written("llama", tmp_path / "base", tiny_model)
    weights = load_file(base / "model.safetensors")
    save_file({**weights, key: torch.ones(64)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(OnecardError, match="has weights that its config has no place for"):
        load_base(ModelConfig(model=str(base)))


def test_a_copy_of_the_embeddings_in_another_precision_is_a_copy(tmp_path, tiny_model):
    adapter = adapter_on(tiny_model, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    weights = load_file(adapter / "adapter_model.safetensors")
    (key,) = (
        name for name in weights if name.endswith("embed_tokens.base_layer.weight") or "embed_tokens.weight" in name
    )
    save_file({**weights, key: weights[key].bfloat16()}, adapter / "adapter_model.safetensors")
    load_frozen_role(ModelConfig(model=str(adapter)), role="policy")
    save_file({**weights, key: weights[key].bfloat16() * 1.01}, adapter / "adapter_model.safetensors")
    with pytest.raises(OnecardError, match="that differ from its base's"):
        load_frozen_role(ModelConfig(model=str(adapter)), role="policy")


def zero_alpha(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 0}))


def zero_factors(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(each) for name, each in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("harm", "why"), [(zero_alpha, "lora_alpha is 0"), (zero_factors, "both of its factors are 0")]
)
def test_an_adapter_that_cannot_learn_is_not_trained(tmp_path, tiny_model, harm, why):
    adapter = adapter_on(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    harm(adapter)
    with pytest.raises(OnecardError, match=f"the adapter on .*q_proj would never learn: {why}"):
        check_model(load_roles(SFTConfig(model=str(adapter)), trained="policy"), 30)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_a_reward_model_with_an_adapter_on_the_head_is_refused(tmp_path, tiny_model, settings):
    adapter = adapter_on(tiny_model, tmp_path / "adapter", **settings)
    load_roles(SFTConfig(model=str(adapter)), trained="policy")
    with pytest.raises(OnecardError, match=r"model: adapter .*adapter adapts the language model head"):
        load_roles(RewardConfig(model=str(adapter)), trained="reward", scalar=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_rslora", "no"), ("use_dora", 1), ("r", 4.5), ("r", "4"), ("r", True), ("lora_alpha", None),
        ("rank_pattern", {"q_proj": "8"}), ("alpha_pattern", 8), ("target_modules", [4]), ("layers_to_transform", "0"),
    ],
)  # fmt: skip
def test_settings_of_another_type_are_refused(tmp_path, tiny_model, name, value):
    """`"no"` would count as true."""
    adapter = adapter_on(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(OnecardError, match=f"adapter has {name}: .*, expected the type that PEFT writes"):
        load_frozen_role(ModelConfig(model=str(adapter)), role="policy")


def test_names_of_targets_are_looked_at_where_an_adapter_goes_on(tmp_path, tiny_model):
    adapter = adapter_on(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    roles = load_roles(DPOConfig(model=str(adapter), lora_target_modules=["q_proj"]), trained="policy", reference=True)
    assert roles.rank("policy") == 4
    with pytest.raises(OnecardError, match="no layer of LlamaForCausalLM is called v_prj"):
        load_roles(DPOConfig(model=str(adapter), lora_target_modules=["v_prj"]), trained="policy")
    with pytest.raises(OnecardError, match="lora_target_modules: empty, expected all-linear or names"):
        load_roles(DPOConfig(model=str(tiny_model), lora_target_modules=[]), trained="policy")


def test_an_adapter_on_a_reward_model_is_no_policy(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "base")
    save_file({"weight": torch.zeros(1, 64), "bias": torch.zeros(1)}, tmp_path / "base" / "head.safetensors")
    adapter = adapter_on(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(OnecardError, match="base is a reward model; expected a language model"):
        load_frozen_role(ModelConfig(model=str(adapter)), role="policy")


def test_a_stored_quantized_base_has_no_weights_to_train_all_of(tmp_path, tiny_model):
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    with pytest.raises(OnecardError, match=r"use_peft: .* is stored quantized, so its weights cannot be trained"):
        load_roles(SFTConfig(model=str(tmp_path / "base"), use_peft=False), trained="policy")


# --- plans of what every command refuses


def test_fit_reads_the_adapter_that_training_goes_on_with(tmp_path, tiny_model, onecard):
    adapter = adapter_on(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    done = onecard("fit", "--model", adapter, "--algorithm", "sft", "--max_length", 32, "--json")
    roles = load_roles(SFTConfig(model=str(adapter)), trained="policy")
    trained = sum(each.numel() for each in roles.trained_parameters().values())
    assert json.loads(done.out)["trained_parameters"] == trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "has peft_type LOHA"),
        ({"bias": "all"}, "trained biases"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    ],
)
def test_fit_refuses_adapters_as_training_does(tmp_path, tiny_model, onecard, change, message):
    adapter = adapter_on(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    done = onecard("fit", "--model", adapter, "--algorithm", "sft", "--max_length", 32)
    assert done.code == 2
    assert message in done.err


def test_fit_refuses_classifiers_and_reward_models(tmp_path, tiny_model, onecard):
    shutil.copytree(tiny_model, tmp_path / "base")
    save_file({"weight": torch.zeros(1, 64)}, tmp_path / "base" / "head.safetensors")
    done = onecard("fit", "--model", tmp_path / "base", "--algorithm", "dpo", "--max_length", 32)
    assert (done.code, "is a reward model" in done.err) == (2, True)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "head.safetensors").unlink()
    changed = {**config, "architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(changed))
    done = onecard("fit", "--model", tmp_path / "base", "--algorithm", "dpo", "--max_length", 32)
    assert (done.code, "which classifies texts" in done.err) == (2, True)


def test_a_base_that_loads_its_own_adapter_is_refused(tmp_path, tiny_model, monkeypatch):
    """As it does with a hub repository that has a config.json beside the adapter."""
    shutil.copytree(tiny_model, tmp_path / "repository")
    adapter_on(tiny_model, tmp_path / "repository", target_modules=["q_proj"])
    monkeypatch.setattr("onecard.models.load.find_source", lambda _: Source(str(tmp_path / "repository")))
    with pytest.raises(OnecardError, match="is an adapter on the hub; download it"):
        load_base(ModelConfig(model="user/adapter"))
