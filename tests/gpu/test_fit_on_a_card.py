"""The plan of `onecard fit` against what a card's allocator says of the same phases."""

from __future__ import annotations

import pytest
import torch

from onecard.config import DPOConfig, PPOConfig, SFTConfig
from tests.engine.fit_material import check_close, compared
from tests.gpu.card import DEVICE, sized

STEP = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dtype": "bfloat16"}
LEAN = {"load_in_4bit": True, "gradient_checkpointing": True, "micro_batch_tokens": 640}
PPO = {**STEP, "num_mini_batches": 1, "response_length": 64, "reward_model_path": "written by the test"}
CASES = {
    "sft": (SFTConfig, STEP),
    "sft, adapters in 16 bit": (SFTConfig, {**STEP, "adapter_dtype": "bfloat16"}),
    "sft, offloaded": (SFTConfig, {**STEP, "gradient_checkpointing": True, "activation_offloading": True}),
    "dpo": (DPOConfig, STEP),
    "dpo, 8-bit optimizer": (DPOConfig, {**STEP, "optim": "adamw_8bit"}),
    "dpo, lean": (DPOConfig, {**STEP, **LEAN}),
    "ppo": (PPOConfig, PPO),
    "ppo, lean": (PPOConfig, {**PPO, **LEAN}),
    "ppo, padded": (PPOConfig, {**PPO, "padding_free": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of a few wide layers, with a tokenizer that is only there to be copied."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=sized(16000, 2000), hidden_size=sized(1024, 128), intermediate_size=sized(2816, 352),
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


# Without a card the same is asked of the CPU's allocator, where tests/engine/test_fit_measured.py asks more
@pytest.mark.parametrize("case", sized(list(CASES), ["dpo, lean"]))
def test_the_plan_is_what_the_allocator_sees(case, folder, tmp_path):
    kind, settings = CASES[case]
    check_close(*compared(kind(model=str(folder), **settings), tmp_path, DEVICE))
