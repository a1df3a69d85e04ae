"""Bases in NF4: what is packed, experts too, computes what its unpacked weights compute."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers.pytorch_utils import Conv1D

from onecard.config import ModelConfig, SFTConfig
from onecard.data.batches import TokenSequence, pack
from onecard.models.build import load_roles
from onecard.models.four_bit import is_quantized, linear_weights
from onecard.models.load import load_base
from onecard.utils.errors import OnecardError
from tests.models.families import FAMILIES, random_model, write_model

BATCH = pack([TokenSequence(tuple(range(7, 47)), (False,) * 4 + (True,) * 36)])
HELD = 0.6  # bytes a packed number takes at most, statistics included
# what each is here for
PACKED = [
    "qwen3_moe",  # stacked experts
    "gpt_oss",  # stacked experts with biases, stored the other way round
    "llama4_text",  # a router that is a linear layer, a shared expert
    "gpt2",  # Conv1D
    "gemma3n_text",  # weights that it clamps itself in training mode
    "rwkv",  # would be divided and packed again in evaluation mode
    "mamba2",  # weights that its kernels read
]


@torch.no_grad()
def unpacked(family, packed):
    """A plain model with the weights that `packed` holds in 4 bit."""
    plain = random_model(FAMILIES[family])
    own = dict(plain.named_parameters())
    for name, weight in linear_weights(packed).items():
        if is_quantized(weight):
            numbers = dequantize_4bit(weight.data, weight.quant_state)
            turned = isinstance(plain.get_submodule(name.rpartition(".")[0]), Conv1D)
            own[name].copy_(numbers.T if turned else numbers)
    return plain


def learned(folder, **settings):
    """`(log-probs, gradients)` of a policy away from its start."""
    roles = load_roles(SFTConfig(model=str(folder), dtype="float32", **settings), trained="policy").train()
    weights = roles.trained_parameters()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    logprobs = roles.logprobs(BATCH, BATCH.targets)
    logprobs.mean().backward()
    return logprobs.detach(), {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("family", PACKED)
def test_packed_weights_compute_what_unpacked_ones_do(tmp_path, family):
    write_model(FAMILIES[family], tmp_path / "model")
    settings = ModelConfig(model=str(tmp_path / "model"), dtype="float32", load_in_4bit=True)
    packed = load_base(settings)
    unpacked(family, packed).save_pretrained(tmp_path / "plain")
    logprobs, gradients = learned(tmp_path / "model", load_in_4bit=True)
    plain_logprobs, plain_gradients = learned(tmp_path / "plain")
    torch.testing.assert_close(logprobs, plain_logprobs, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        largest = float(plain_gradients[name].abs().max())
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "phimoe"])
def test_experts_are_packed_not_held_in_16_bit(tmp_path, family):
    random_model(FAMILIES[family]).save_pretrained(tmp_path)
    model = load_base(ModelConfig(model=str(tmp_path), dtype="bfloat16", load_in_4bit=True))
    experts = {name: weight for name, weight in linear_weights(model).items() if ".experts." in name}
    assert experts
    for name, weight in experts.items():
        assert is_quantized(weight), name
        assert weight.numel() * weight.element_size() <= HELD * weight.quant_state.shape.numel(), name


def test_what_would_stay_in_16_bit_is_refused(tmp_path):
    """Falcon's layers are of a class of its own, which transformers does not pack."""
    random_model(FAMILIES["falcon"]).save_pretrained(tmp_path)
    with pytest.raises(OnecardError, match=r"load_in_4bit: 100% of the weights of FalconForCausalLM .* of a FalconLin"):
        load_base(ModelConfig(model=str(tmp_path), load_in_4bit=True))
