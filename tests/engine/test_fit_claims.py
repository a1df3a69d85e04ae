"""The README's memory claims, checked with the memory planner at the settings of each claim."""

from __future__ import annotations

import pytest
import torch

from onecard.commands.fit.model import find_model, shipped_configs
from onecard.commands.fit.phases import Lengths
from onecard.commands.fit.plan import MemoryPlan, plan_memory
from onecard.commands.fit.weights import plan_base
from onecard.config import DPOConfig, PPOConfig

GIB = 2**30
SETTINGS = {
    "load_in_4bit": True,
    "gradient_checkpointing": True,
    "micro_batch_tokens": 2048,
    "optim": "paged_adamw_8bit",
    "lora_r": 16,
}
DPO = DPOConfig(**SETTINGS)
# Three adapters (policy, critic, reward); prompts are sampled in batches of eight.
PPO = PPOConfig(
    **SETTINGS, reward_model_path="reward", response_length=512, batch_size=8, local_rollout_forward_batch_size=8
)

# Published parameter counts, in billions. They show that the shipped model configs are right.
PARAMETERS = {
    "Llama-3.1-8B": 8.030,
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.544,
    "Qwen2.5-7B": 7.616,
    "Qwen2.5-14B": 14.770,
    "Qwen3-4B": 4.022,
    "Gemma-2-2B": 2.614,
}


def planned(model: str, config) -> MemoryPlan:
    return plan_memory(find_model(model).config, config, Lengths(512, 512), torch.device("cuda"))


@pytest.mark.parametrize(
    ("model", "config", "limit_gib"),
    [
        ("Llama-3.1-8B", PPO, 9.5),
        ("Llama-3.1-8B", DPO, 8.5),
        pytest.param("Qwen2.5-14B", PPO, 16.0, marks=pytest.mark.grid),
        pytest.param("Qwen2.5-1.5B", PPO, 4.0, marks=pytest.mark.grid),
    ],
    ids=["8B ppo", "8B dpo", "14B ppo", "1.5B ppo"],
)
def test_peaks_are_within_the_readme_s_limits(model, config, limit_gib):
    plan = planned(model, config)
    print(f"{model}: {plan.peak / GIB:.2f} GiB in {plan.highest.name}, promised {limit_gib}")
    assert plan.peak <= limit_gib * GIB


def test_size_of_an_8b_base_in_nf4_equals_hand_calculation():
    """Per weight: 1/2 byte, 1/64 byte for block scales, 4/(64 * 256) for their scales. Embeddings and head: 16 bit."""
    model = find_model("Llama-3.1-8B").config
    linear = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    by_hand = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * 128256 * 4096 * 2
    plan = plan_memory(model, DPO, Lengths(8, 8), torch.device("cuda"))
    assert plan.parameters == pytest.approx(by_hand, rel=2e-3)  # the rest: norms, code tables, rounding of allocations
    assert plan.phases[-1].parts["adapters and heads"] == 41_943_040 * 4


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_shipped_shapes_have_their_models_parameters(name):
    model = plan_base(find_model(name).config, DPOConfig(), torch.device("cuda"))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == PARAMETERS[name]
    assert set(shipped_configs()) == set(PARAMETERS)
