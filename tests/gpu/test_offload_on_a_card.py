"""Activations in pinned host memory: the same gradients, a lower peak, nothing left, and no memory reused too early."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from onecard.batches import TokenSequence, pack, to_device
from onecard.config import DPOConfig
from onecard.models.build import load_roles
from onecard.models.offload import CudaCopier, Offloader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LLAMA = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "nf4"])
def test_the_same_gradients_at_a_lower_peak(llama, checkpointing, four_bit):
    """4096 tokens, 8 MiB a hidden state: with checkpoints 12 of them leave, without far more."""
    config = DPOConfig(
        model=str(llama), load_in_4bit=four_bit, gradient_checkpointing=checkpointing, adapter_dtype="bfloat16"
    )
    roles = load_roles(config, trained="policy").train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    sequences = [tuple((31 * i + 7 * j) % 4000 for i in range(1024)) for j in range(4)]
    batch = to_device(pack([TokenSequence(each, (False,) * 512 + (True,) * 512) for each in sequences]), roles.device)

    def step() -> tuple[int, list[torch.Tensor]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        roles.logprobs(batch, batch.targets).mean().backward()
        peak = torch.cuda.max_memory_allocated() - before
        found = [parameter.grad.clone() for parameter in roles.trained_parameters().values()]
        roles.zero_grad()
        return peak, found

    step()  # what libraries keep for themselves
    peak, expected = step()
    again = step()[1]
    steady = all(torch.equal(one, two) for one, two in zip(expected, again, strict=True))  # are its kernels, at all?
    roles.offload_activations()
    step()
    lower, got = step()
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0 if steady else 2e-2, atol=0 if steady else 1e-3)
    print(f"{peak / 2**20:.0f} MiB, offloaded {lower / 2**20:.0f} MiB")
    layers, tokens = LLAMA["num_hidden_layers"], sum(batch.lengths)
    states = layers * tokens * LLAMA["hidden_size"] * 2
    assert lower <= peak - 0.6 * states  # a few layers' are on the device at any time
    assert lower < (0.9 if checkpointing else 0.5) * peak


def test_memory_is_not_written_before_it_has_been_read():
    """A busy device: copies are far behind the host. Each storage's place is asked for at once and overwritten."""
    offloader = Offloader(nn.Identity(), torch.device("cuda"))
    assert isinstance(offloader.copier, CudaCopier)
    x = torch.ones(1 << 22, device="cuda", requires_grad=True)
    heavy = torch.randn(4096, 4096, device="cuda")
    with offloader.hooks():
        loss = torch.zeros((), device="cuda")
        for power in range(1, 40):
            heavy = heavy @ heavy
            heavy = heavy / heavy.norm()
            loss = loss + (torch.full((1 << 22,), float(power), device="cuda") * x).sum()
    for _ in range(20):  # the backward's copies come while these are being made and dropped
        heavy = (heavy @ heavy) / heavy.norm()
    loss.backward()
    torch.cuda.synchronize()
    assert torch.equal(x.grad, torch.full_like(x, float(sum(range(1, 40)))))


def test_nothing_stays_on_the_device():
    offloader = Offloader(nn.Identity(), torch.device("cuda"))
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)

    def use(thrown_away: bool) -> None:
        with offloader.hooks():
            state = x
            for _ in range(8):
                state = state.exp() * 0.1
        if not thrown_away:
            state.sum().backward()
        x.grad = None

    for thrown_away in (False, True):
        use(thrown_away)
        gc.collect()
        before = torch.cuda.memory_allocated()
        use(thrown_away)
        gc.collect()
        assert torch.cuda.memory_allocated() == before
