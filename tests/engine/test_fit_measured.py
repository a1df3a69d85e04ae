"""The plan against the profiler's memory events of the same phases, on models that a CPU runs."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from benchmarks.measure import peak_bytes
from onecard.commands.fit.model import read_config
from onecard.commands.fit.phases import Lengths
from onecard.commands.fit.plan import plan_memory
from onecard.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from onecard.models.build import load_ppo_roles
from onecard.rollout import Sampling, sample_responses, sampling_budget
from tests.engine.fit_material import CPU, MOST_OFF, check_close, compared
from tests.grid import grid

os.environ.setdefault("KINETO_LOG_LEVEL", "9")

STEP = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
PPO = {**STEP, "num_mini_batches": 1, "response_length": 64}
SCORED = {**PPO, "reward_model_path": "written by the test"}
LEAN = {"load_in_4bit": True, "gradient_checkpointing": True, "micro_batch_tokens": 320}

CASES = {
    "sft": ("llama", SFTConfig, STEP),
    "sft, lean": ("llama", SFTConfig, {**STEP, **LEAN}),
    "sft, all weights": ("llama", SFTConfig, {**STEP, "use_peft": False}),
    "sft, adapter on the head": ("llama", SFTConfig, {**STEP, "lora_target_modules": ["q_proj", "lm_head"]}),
    "sft, small chunks of the head": ("qwen", SFTConfig, {**STEP, "head_chunk_tokens": 64}),
    "sft, capped attention": ("gemma", SFTConfig, STEP),
    "sft, 16 bit": ("llama", SFTConfig, {**STEP, "dtype": "bfloat16", "adapter_dtype": "bfloat16"}),
    "sft, experts": ("mixture", SFTConfig, STEP),
    "sft, experts in 4 bit": ("mixture", SFTConfig, {**STEP, **LEAN}),
    "sft, experts in 4 bit, not checkpointed": ("mixture", SFTConfig, {**STEP, "load_in_4bit": True}),
    "ppo, experts": ("mixture", PPOConfig, SCORED),
    "sft, all weights, experts": ("mixture", SFTConfig, {**STEP, "use_peft": False}),
    "sft, all weights, 16 bit": ("llama", SFTConfig, {**STEP, "use_peft": False, "dtype": "bfloat16"}),
    "reward": ("qwen", RewardConfig, STEP),
    "dpo": ("llama", DPOConfig, STEP),
    "dpo, checkpointed": ("qwen", DPOConfig, {**STEP, "gradient_checkpointing": True}),
    "dpo, 4 bit": ("llama", DPOConfig, {**STEP, "load_in_4bit": True}),
    "dpo, a few tokens": ("llama", DPOConfig, {**STEP, "micro_batch_tokens": 320}),
    "dpo, prompts not shared": ("qwen", DPOConfig, {**STEP, "share_prompts": False}),
    "dpo, padded": ("llama", DPOConfig, {**STEP, "padding_free": False}),
    "dpo, padded and checkpointed": (
        "llama",
        DPOConfig,
        {**STEP, "padding_free": False, "gradient_checkpointing": True},
    ),
    "dpo, all weights": ("llama", DPOConfig, {**STEP, "use_peft": False}),
    "sft, sdpa and checkpointed": ("qwen", SFTConfig, {**STEP, "attn_implementation": "sdpa", **LEAN}),
    "dpo, eager": ("llama", DPOConfig, {**STEP, "attn_implementation": "eager"}),
    "kto": ("llama", DPOConfig, {**STEP, "loss_type": ["kto"]}),
    "ppo": ("llama", PPOConfig, SCORED),
    "ppo, lean": ("llama", PPOConfig, {**SCORED, **LEAN}),
    "ppo, padded": ("qwen", PPOConfig, {**SCORED, "padding_free": False}),
    "ppo, shared critic": ("llama", PPOConfig, {**PPO, "critic": "shared"}),
    "ppo, no critic": ("llama", PPOConfig, {**PPO, "advantage_estimator": "grpo", "num_generations": 2}),
    "ppo, entropy bonus": ("qwen", PPOConfig, {**PPO, "entropy_coef": 0.1}),
    "ppo, pretrained": ("tinystories", PPOConfig, {**SCORED, "load_in_4bit": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models of a few layers, each with a tokenizer that is only there to be copied."""
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        LlamaConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen3MoeConfig,
    )

    configs = {
        "llama": LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=512,
        ),
        "qwen": Qwen2Config(
            vocab_size=5000, hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True,
        ),
        "gemma": Gemma2Config(
            vocab_size=3000, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=3, head_dim=32, max_position_embeddings=512, sliding_window=64,
        ),
        "mixture": Qwen3MoeConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=512, num_experts=8, num_experts_per_tok=2,
            moe_intermediate_size=256,
        ),
    }  # fmt: skip
    root = tmp_path_factory.mktemp("models")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


# Each setting once
USUAL = (
    "sft, lean", "sft, all weights", "sft, adapter on the head", "sft, small chunks of the head",
    "sft, capped attention", "sft, 16 bit", "sft, experts", "reward", "dpo, padded and checkpointed", "dpo, 4 bit",
    "dpo, a few tokens", "kto", "ppo, shared critic", "ppo, lean",
)  # fmt: skip


@pytest.mark.parametrize("case", grid(CASES, USUAL))
def test_the_plan_is_what_the_profiler_sees(case, folders, request, tmp_path):
    model, kind, settings = CASES[case]
    folder = request.getfixturevalue(model) if model == "tinystories" else folders / model
    config = kind(model=str(folder), **settings)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    check_close(*compared(config, tmp_path))


@pytest.mark.grid
def test_a_rollouts_cache_at_its_final_length(folders):
    """Short prompts and long answers: most is held when the last token is drawn."""
    config = PPOConfig(model=str(folders / "llama"), response_length=240, **STEP, num_mini_batches=1)
    model = read_config(folders / "llama" / "config.json")
    plan = plan_memory(model, config, Lengths(4, 240), CPU)
    phase = next(phase for phase in plan.phases if phase.name == "rollout")
    roles = load_ppo_roles(config)
    prompts = [(5,) * 4] * (config.episodes_per_step - 1) + [(5,) * 3]

    def sample() -> None:
        sample_responses(roles, prompts, Sampling(240), stop_tokens=(), batch_size=sampling_budget(64))

    real = peak_bytes(sample, CPU)
    assert phase.peak - phase.before == pytest.approx(real, rel=MOST_OFF)
    assert phase.parts["kv cache"] > 0.7 * real


@pytest.mark.parametrize("lengths", grid([Lengths(96, 64), Lengths(120, 130)], [Lengths(96, 64)]), ids=str)
def test_a_rollout_with_prompts_coming_in_beside_a_full_cache(folders, lengths):
    """More episodes than rows. Answers end one after the other, so that the cache is full when the last ones come."""
    rows, more = 4, {"local_rollout_forward_batch_size": 4, "per_device_train_batch_size": 16}
    config = PPOConfig(model=str(folders / "llama"), response_length=lengths.response, num_mini_batches=1, **more)
    plan = plan_memory(read_config(folders / "llama" / "config.json"), config, lengths, CPU)
    phase = next(phase for phase in plan.phases if phase.name == "rollout")
    roles = load_ppo_roles(config)
    prompts = [(5,) * lengths.prompt] * (config.episodes_per_step - 1) + [(5,) * (lengths.prompt - 1)]
    assert len(prompts) == 16
    ends = range(0, 400, 40)

    def sample() -> None:
        sample_responses(
            roles, prompts, Sampling(lengths.response), stop_tokens=ends, batch_size=sampling_budget(rows), seed=1
        )

    assert phase.peak - phase.before == pytest.approx(peak_bytes(sample, CPU), rel=MOST_OFF)
