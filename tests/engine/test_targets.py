"""Which layers get an adapter: what all-linear means, what names mean, and what is said where they mean nothing."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.config import PPOConfig, SFTConfig
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.targets import find_targets
from onecard.utils.errors import OnecardError
from tests.models.families import FAMILIES, config_of, random_model


def model_of(family: str):
    return random_model(FAMILIES[family])


def kinds(names) -> dict[str, int]:
    """How many layers there are of each path, numbers aside."""
    found: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"\.\d+\.", ".", name).removeprefix("model.layers.")
        found[kind] = found.get(kind, 0) + 1
    return found


ATTENTION = dict.fromkeys(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"], 3)
MLP = ["gate_proj", "up_proj", "down_proj"]
SHARED = {f"mlp.shared_expert.{name}": 3 for name in MLP}
LINEAR = {
    "llama": (ATTENTION | {f"mlp.{name}": 3 for name in MLP}, ()),
    "qwen3_moe": (ATTENTION, ("the experts of 3 layers",)),  # experts are one parameter, its router no linear layer
    "qwen2_moe": (ATTENTION | SHARED, ("the experts of 3 layers",)),  # shared_expert_gate is a router of one
    "laguna": (
        ATTENTION
        | {"self_attn.g_proj": 3}
        | {f"mlp.{name}": 1 for name in MLP}
        | {f"mlp.shared_experts.{name}": 2 for name in MLP},
        ("the experts of 2 layers",),
    ),
    "afmoe": (
        ATTENTION
        | {"self_attn.gate_proj": 3}  # a gate of the attention's output, and no router
        | {f"mlp.{name}": 1 for name in MLP}
        | {f"mlp.shared_experts.{name}": 2 for name in MLP},
        ("the experts of 2 layers",),
    ),
    "jetmoe": ({"self_attention.kv_proj": 3}, ("the experts of 6 layers",)),  # attention's projections are experts
    "llama4_text": (
        ATTENTION | {f"feed_forward.shared_expert.{name}": 3 for name in MLP},
        ("the experts of 3 layers",),
    ),
    "deepseek_v32": (None, ("the experts of 2 layers", "9 layers that get no gradient")),  # what picks keys
    "mamba": (
        {"backbone.layers.mixer.in_proj": 3, "backbone.layers.mixer.x_proj": 3},
        ("out_proj and dt_proj of 3 Mamba layers",),
    ),
}


@pytest.mark.parametrize("family", LINEAR)
def test_all_linear_is_the_linear_layers_that_learn(family):
    expected, left_out = LINEAR[family]
    found = find_targets(model_of(family), ["all-linear"])
    assert found.left_out == left_out
    assert not found.parameters
    if expected is not None:
        assert kinds(found.modules) == expected


@pytest.mark.parametrize("family", ["llama", "laguna", "qwen2_moe", "mamba"])
def test_a_plan_on_meta_has_the_same_layers(family):
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(config_of(FAMILIES[family]))
    assert find_targets(planned, ["all-linear"]) == find_targets(model_of(family), ["all-linear"])


def test_layers_of_a_vision_tower_get_none():
    """Text does not run through them. Theirs are called q_proj as well."""
    model = model_of("gemma3")
    assert sum(name.endswith("q_proj") for name, _ in model.named_modules()) == 5
    found = find_targets(model, ["all-linear"]).modules
    assert len(found) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in found)
    assert find_targets(model, ["q_proj"]).modules == tuple(name for name in found if name.endswith("q_proj"))
    with pytest.raises(OnecardError, match=r"vision_tower\S*out_proj is a Linear outside of the text decoder"):
        find_targets(model, ["out_proj"])


def test_names_are_the_ends_of_paths():
    model = model_of("llama")
    assert find_targets(model, ["layers.0.mlp.up_proj"]).modules == ("model.layers.0.mlp.up_proj",)
    assert kinds(find_targets(model, ["self_attn.q_proj", "up_proj"]).modules) == {
        "self_attn.q_proj": 3,
        "mlp.up_proj": 3,
    }
    assert find_targets(model, ["embed_tokens", "lm_head"]).modules == ("model.embed_tokens", "lm_head")


def test_all_linear_beside_a_name_means_both():
    model = model_of("llama")
    alone = find_targets(model, ["all-linear"]).modules
    for names in (["all-linear", "lm_head"], ["lm_head", "all-linear"], ["lm_head", "all-linear", "q_proj"]):
        assert find_targets(model, names).modules == (*alone, "lm_head")


def test_a_linear_layer_that_gives_no_product_gets_none():
    """A block-diagonal one is a subclass, too; one that writes the same product another way gets its adapter."""
    found = find_targets(model_of("deepseek_v4"), ["all-linear"])
    assert not [name for name in found.modules if name.endswith("o_a_proj")]
    assert "3 layers that are not plain linear layers" in found.left_out
    assert kinds(find_targets(model_of("rwkv"), ["all-linear"]).modules) == dict.fromkeys(
        [
            "rwkv.blocks.attention.key",
            "rwkv.blocks.attention.value",
            "rwkv.blocks.attention.receptance",
            "rwkv.blocks.feed_forward.key",
            "rwkv.blocks.feed_forward.receptance",
        ],
        3,
    )
    assert find_targets(model_of("falcon"), ["dense"]).modules[0] == "transformer.h.0.self_attention.dense"


@pytest.mark.parametrize(
    ("family", "names", "message"),
    [
        ("llama", ["q_proj", "v_prj"], r"is called v_prj; .* Did you mean 'v_proj'\?"),
        ("llama", ["q_proj", "all_linear"], r"is called all_linear; .* Did you mean 'all-linear'\?"),
        ("llama", ["proj"], "is called proj;"),  # the end of a name is no name
        ("llama", ["norm"], r"model.norm is a LlamaRMSNorm; expected linear layers or embeddings of the text decoder"),
        ("qwen3_moe", ["down_proj"], r"down_proj matches only experts \(model.layers.0.mlp.experts.down_proj, ...\); "
                                     "to adapt them, write experts.down_proj"),
        ("qwen3_moe", ["mlp.gate"], "model.layers.0.mlp.gate is a Qwen3MoeTopKRouter, which takes no adapter"),
        ("llama4_text", ["router"], "model.layers.0.feed_forward.router is a Llama4Router, which takes no adapter"),
        ("phimoe", ["q_proj", "router"], "model.layers.0.mlp.router is a PhimoeTopKRouter, which takes no adapter"),
        ("rwkv", ["attention.output"], "rwkv.blocks.0.attention.output is a Linear, which takes no adapter"),
        ("deepseek_v4", ["o_a_proj"], "o_a_proj is a DeepseekV4GroupedLinear, which takes no adapter"),
    ],
)  # fmt: skip
def test_a_name_that_means_no_layer_is_an_error(family, names, message):
    with pytest.raises(OnecardError, match=f"lora_target_modules: .*{message}"):
        find_targets(model_of(family), names)


def test_experts_are_adapted_where_a_name_says_so():
    """A bare name stays with the shared expert's layer."""
    model = model_of("qwen2_moe")
    assert kinds(find_targets(model, ["down_proj"]).modules) == {"mlp.shared_expert.down_proj": 3}
    found = find_targets(model, ["q_proj", "experts.down_proj"])
    assert kinds(found.modules) == {"self_attn.q_proj": 3}
    assert found.parameters == tuple(f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(3))


def test_experts_that_are_modules_are_named_without_their_number():
    """As models have them that come with code of their own."""
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"w1": torch.nn.Linear(48, 4)}) for _ in range(2))
        layer.mlp.gate = torch.nn.Linear(48, 2)
    found = find_targets(model, ["all-linear"])
    assert kinds(found.modules) == LINEAR["llama"][0]
    assert found.left_out == ("the experts of 3 layers",)
    assert len(find_targets(model, ["experts.w1"]).modules) == 6
    assert find_targets(model, ["layers.1.mlp.experts.1.w1"]).modules == ("model.layers.1.mlp.experts.1.w1",)
    with pytest.raises(OnecardError, match="w1 matches only experts"):
        find_targets(model, ["w1"])


def test_every_role_has_the_same_layers_but_for_the_head(tiny_model):
    roles = load_ppo_roles(PPOConfig(model=str(tiny_model), lora_target_modules=["all-linear", "lm_head"]))
    assert (roles.num_adapted_layers("policy"), roles.num_adapted_layers("value")) == (15, 14)
    policy, value = (
        {name.split(".lora_")[0] for name in roles.trained_parameters() if f".{role}." in name}
        for role in ("policy", "value")
    )
    assert policy - value == {"model.base_model.model.lm_head"}


def test_what_is_trained_and_left_out_is_said(onecard, tmp_path):
    """A model of experts that would train 16 times as many parameters with them."""
    model = model_of("laguna")
    model.save_pretrained(tmp_path / "model")
    roles = load_roles(SFTConfig(model=str(tmp_path / "model")), trained="policy")
    assert roles.left_out == ("the experts of 2 layers",)
    from onecard.algorithms.common import describe_adapter

    assert (
        describe_adapter(roles, "policy", None) == "an adapter of rank 16 on 24 layers, without the experts of 2 layers"
    )
    assert not [name for name in roles.trained_parameters() if ".experts." in name or ".gate." in name]
