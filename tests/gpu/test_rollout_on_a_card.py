"""Sampling on a card: rows that take the next prompt, and passes that are recorded and replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard.config import SFTConfig
from onecard.data.batches import TokenSequence, pack, to_device
from onecard.models.build import load_roles
from onecard.models.roles import Roles
from onecard.rollout import Rollout, Sampling, sample_responses
from onecard.rollout.cuda_graphs import Inputs, Pass, cuda_graph, use_capture_function
from tests.gpu.card import CARD, DEVICE, sized

BASES = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "nf4": {"load_in_4bit": True, "dtype": "bfloat16"},
}
over_bases = pytest.mark.parametrize("base", BASES)
NATS = {"fp32": 1e-3, "bf16": 0.1, "nf4": 0.1}  # as drawn, one token at a time, against one pass over all
ENDS = range(0, 4096, 64)


def roles_of(folder: Any, base: str) -> Roles:
    """A policy whose adapter says something."""
    roles = load_roles(SFTConfig(model=str(folder), lora_r=8, **BASES[base]), trained="policy", reference=True)
    torch.manual_seed(0)
    for name, weight in roles.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return roles.eval()


def prompts() -> list[list[int]]:
    return [[(31 * i + 7 * j) % 4000 + 5 for i in range(3 + 5 * (j % 7))] for j in range(sized(48, 9))]


def sampled(roles: Roles) -> Rollout:
    settings = Sampling(sized(160, 12))
    return sample_responses(roles, prompts(), settings, stop_tokens=ENDS, batch_size=sized(16, 4), seed=7)


def off(roles: Roles, found: Rollout) -> float:
    """The largest difference, in nats, between a log-probability as drawn and the same of one pass."""
    worst = 0.0
    for prompt, response in zip(prompts(), found.responses, strict=True):
        mask = (False,) * len(prompt) + (True,) * len(response.tokens)
        batch = pack([TokenSequence((*prompt, *response.tokens), mask)])
        with torch.no_grad():
            own = roles.logprobs(to_device(batch, DEVICE), to_device(batch.targets, DEVICE))
        worst = max(worst, (own.cpu() - response.logprobs).abs().max().item())
    return worst


@over_bases
def test_logprobs_as_drawn_are_those_of_the_finished_sequences(llama, base):
    roles = roles_of(llama, base)
    assert off(roles, sampled(roles)) <= NATS[base]


@over_bases
def test_a_recorded_pass_draws_from_the_same_distribution(llama, base, capsys):
    """With `cuda_graph` on a card; dry, the pass itself stands in for its recording."""
    roles, recorded = roles_of(llama, base), []

    def recorder(run: Pass, inputs: Inputs) -> Pass:
        recorded.append(inputs["attention_mask"].shape)
        return cuda_graph(run, inputs) if CARD else run

    with use_capture_function(recorder):
        found = sampled(roles)
    assert "cannot be captured" not in capsys.readouterr().err
    assert recorded
    assert off(roles, found) <= NATS[base]


@over_bases
def test_recorded_passes_leave_nothing_allocated(llama, base):
    if not CARD:
        pytest.skip("needs a CUDA GPU: what the allocator says")
    roles = roles_of(llama, base)
    with use_capture_function(cuda_graph):
        sampled(roles)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        sampled(roles)
        assert torch.cuda.memory_allocated() == before
