"""Attention over packed and shared sequences on a card: its varlen kernels against eager attention, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard.batches import pack, to_device
from onecard.models import attention
from onecard.models.attention import Score, segments_of
from tests.engine.attention_material import (
    answer,
    distance,
    gradient,
    judged,
    logprobs,
    own_roles,
    random_model,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

NAMES = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "opt", "gpt_neox"]
LAYOUTS = [("packed", False), ("packed", True), ("padded", False)]


def kernels_that_run(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    names: set[str] = set()
    choose = attention.kernel_for

    def chosen(*arguments: Any) -> Any:
        found = choose(*arguments)
        names.add(found.__name__)
        return found

    monkeypatch.setattr(attention, "kernel_for", chosen)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_every_layout_is_as_near_to_the_truth_as_eager_is(monkeypatch, name):
    """The truth is fp32 of the same rounded weights, one sequence at a time."""
    rounded = random_model(name).bfloat16().cuda()
    exact = random_model(name).cuda()
    exact.load_state_dict(rounded.state_dict())
    truth = judged(exact).detach()
    slopes = gradient(exact, judged(exact))
    of_values = distance(judged(rounded).detach(), truth)
    of_slopes = distance(gradient(rounded, judged(rounded)), slopes)
    ran = kernels_that_run(monkeypatch)
    roles = own_roles(rounded)
    for layout, share in LAYOUTS:
        found = logprobs(roles, layout, share_prompts=share)
        assert distance(found.detach(), truth) < 2 * of_values, (layout, share)
        assert distance(gradient(rounded, found), slopes) < 2 * of_slopes, (layout, share)
    assert "by_sdpa" not in ran or torch.cuda.get_device_capability() < (8, 0)


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_every_layout_gives_the_same_gradients(name):
    model = random_model(name).cuda()
    truth, slopes = judged(model).detach(), gradient(model, judged(model))
    roles = own_roles(model)
    for layout, share in LAYOUTS:
        found = logprobs(roles, layout, share_prompts=share)
        assert distance(found.detach(), truth) < 5e-6, (layout, share)
        assert distance(gradient(model, found), slopes) < 5e-6, (layout, share)


def test_memory_does_not_grow_with_the_square_of_the_record():
    """64 sequences of 256 tokens: bool for each pair of the record's tokens alone would be 256 MiB."""
    prompt = range(100)
    sequences = [answer(prompt, [place % 50] * 156) for place in range(64)]
    for batch in (pack(sequences), pack(sequences, {place: (place - 1, 100) for place in range(1, 64, 2)})):
        segments = segments_of(to_device(batch, torch.device("cuda")))
        made = [
            torch.randn(1, batch.num_tokens, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        query, key, value = (each.transpose(1, 2) for each in made)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, _ = attention.attend(torch.nn.Identity(), query, key, value, None, sliding_window=None, segments=segments)
        out.float().square().sum().backward()
        assert torch.cuda.max_memory_allocated() - before < 128 << 20


def test_a_plan_on_meta_tensors_picks_the_kernel_that_runs():
    query = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16)
    with attention.planned_for(torch.device("cuda")):
        planned = attention.kernel_for(query.to("meta"), Score(1.0))
    if torch.cuda.get_device_capability() >= (8, 0):
        assert attention.kernel_for(query.cuda(), Score(1.0)) in (planned, attention.by_flash_attn)
