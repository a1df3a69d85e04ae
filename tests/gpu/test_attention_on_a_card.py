"""Attention over packed and shared sequences on a card: its varlen kernels against eager attention, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.measure import peak_bytes
from onecard.data.batches import pack, to_device
from onecard.models import attention
from onecard.models.attention import AttentionOptions, has_flash, segments_of
from tests.engine.attention_material import (
    answer,
    distance,
    gradient,
    judged,
    logprobs,
    own_roles,
    random_model,
)
from tests.gpu.card import DEVICE, sized

NAMES = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "opt", "gpt_neox"]
NAMES = sized(NAMES, NAMES[:1])  # tests/engine/test_attention.py has them all on the CPU
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
def test_in_bfloat16_every_layout_is_as_near_to_truth_as_eager(monkeypatch, name):
    """The truth is fp32 of the same rounded weights, one sequence at a time."""
    rounded = random_model(name).bfloat16().to(DEVICE)
    exact = random_model(name).to(DEVICE)
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
    assert ran
    assert "by_sdpa" not in ran or not has_flash(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_every_layout_gives_the_same_gradients(name):
    model = random_model(name).to(DEVICE)
    truth, slopes = judged(model).detach(), gradient(model, judged(model))
    roles = own_roles(model)
    for layout, share in LAYOUTS:
        found = logprobs(roles, layout, share_prompts=share)
        assert distance(found.detach(), truth) < 5e-6, (layout, share)
        assert distance(gradient(model, found), slopes) < 5e-6, (layout, share)


def test_memory_does_not_grow_with_the_square_of_the_record():
    """64 sequences of 256 tokens: bool for each pair of the record's tokens alone would be 256 MiB."""
    prompt = range(100)
    count = sized(64, 4)
    sequences = [answer(prompt, [place % 50] * 156) for place in range(count)]
    for batch in (pack(sequences), pack(sequences, {place: (place - 1, 100) for place in range(1, count, 2)})):
        segments = segments_of(to_device(batch, DEVICE))
        made = [
            torch.randn(1, batch.num_tokens, heads, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        query, key, value = (each.transpose(1, 2) for each in made)

        def step(given=(query, key, value), among=segments) -> None:
            out, _ = attention.attend(torch.nn.Identity(), *given, None, sliding_window=None, segments=among)
            out.float().square().sum().backward()

        assert peak_bytes(step, DEVICE) < 128 << 20


def test_a_plan_on_meta_tensors_picks_the_kernel_that_runs():
    query = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16)
    with attention.planned_for(torch.device("cuda")):
        planned = attention.kernel_for(query.to("meta"), query, AttentionOptions(1.0))
    assert planned is attention.by_torch_varlen
    runs = attention.kernel_for(query.to(DEVICE), query, AttentionOptions(1.0))
    assert runs in (planned, attention.by_flash_attn) if has_flash(DEVICE, query.dtype) else runs is attention.by_sdpa
