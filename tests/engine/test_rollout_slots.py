"""Rows that take the next prompt where one has ended: the same answers as batches give, in fewer passes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from onecard.models.attention import use_own_attention
from onecard.rollout import Padded, Sampling, sampler
from onecard.rollout.slots import GROWTH, SlotLayer, Slots, takes_slots
from tests.engine.rollout_material import Player, common_ends, load, own_logprobs, spied

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def batched(model: Any, rows: int, columns: int, device: torch.device) -> Padded:
    return Padded(model, rows, device)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 5, 18])
def test_answers_are_those_of_batches(monkeypatch, player: Player, rows, temperature):
    """Each prompt with draws of its own, so that nothing depends on what stands beside it."""
    prompts, ends = player.prompts * 3, common_ends(player)

    def sampled() -> Any:
        return player.sample(Sampling(40, temperature), prompts, ends=ends, batch_size=rows, seed=3).responses

    together = sampled()
    monkeypatch.setattr(sampler, "make_held", batched)
    for one, other in zip(together, sampled(), strict=True):
        assert one.tokens == other.tokens
        assert one.finished == other.finished
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=0)
    assert len({len(response.tokens) for response in together}) > 5


def test_a_row_that_ends_takes_the_next_prompt(monkeypatch, player: Player):
    """Passes over rows that are nearly full, and far fewer of them than batches take."""
    prompts, ends = player.prompts * 16, common_ends(player)

    def passes() -> tuple[list[tuple[int, int]], int]:
        with spied(player.model) as shapes:
            found = player.sample(Sampling(60), prompts, ends=ends, batch_size=16, seed=1).responses
        return shapes, sum(len(response.tokens) for response in found)

    shapes, tokens = passes()
    incoming = [rows for rows, columns in shapes if columns > 1]
    assert sum(incoming) == len(prompts)
    assert incoming[0] == 16
    assert len(incoming) > 10
    assert tokens <= sum(rows for rows, _ in shapes) < 1.2 * tokens
    monkeypatch.setattr(sampler, "make_held", batched)
    in_batches, same = passes()
    assert same == tokens
    assert len(shapes) < 0.75 * len(in_batches)


def test_a_short_prompt_does_not_see_whose_place_it_takes(player: Player):
    """The longest prompts come first, so that all others stand where something longer has been."""
    torch.manual_seed(0)
    prompts = [player.prompts[3] * 3, *player.prompts]
    found = player.sample(Sampling(30), prompts, ends=common_ends(player), batch_size=1).responses
    for prompt, response in zip(prompts, found, strict=True):
        own = own_logprobs(player, prompt, response, 1.0)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)


def test_memory_grows_with_the_longest_row_and_no_further_than_its_end(player: Player):
    length = GROWTH * 2 + 5
    held = Slots(player.model, 2, length - 1, torch.device("cpu"))
    taken = []
    for place, _ in zip(range(length - 1), run(held, player, length), strict=False):
        taken.append((place, held.cache.layers[0].keys.shape[2]))
    capacities = sorted({columns for _, columns in taken})
    assert capacities == [GROWTH, 2 * GROWTH, length - 1]


def run(held: Slots, player: Player, length: int) -> Any:
    """Token after token of one row; the other one has no prompt."""
    logits = held.admit([player.prompts[0]], [0], [0], 0)
    for _ in range(length - 1 - len(player.prompts[0])):  # a column each
        held.extend(torch.tensor([5]) if len(logits) == 1 else torch.tensor([5, 6]), [0] if len(logits) == 1 else None)
        logits = held.logits()
        assert logits.isfinite().all()
        yield logits


def test_what_was_never_written_is_zero():
    """Masked keys have no weight, but no weight times nan is nan."""
    layer = SlotLayer(
        Slots(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), 3, 300, torch.device("cpu")).layout, 3
    )
    layer.layout.grow(7)
    new = torch.full((2, 4, 7, 8), torch.nan)
    grown = layer.roomy(None, new)
    assert grown.shape == (3, 4, GROWTH, 8)
    assert not grown.any()
    layer.layout.grow(200)
    again = layer.roomy(grown + 1, new)
    assert again.shape == (3, 4, 2 * GROWTH, 8)
    assert (again[:, :, :GROWTH] == 1).all()
    assert not again[:, :, GROWTH:].any()


def test_the_cache_is_gone_when_sampling_is_over(monkeypatch, player: Player):
    """At once, without the collector: the next phase begins with all memory."""
    kept = []
    make = sampler.make_held

    def watched(*given: Any) -> Any:
        held = make(*given)
        assert isinstance(held, Slots)
        kept.append(weakref.ref(held))
        return held

    monkeypatch.setattr(sampler, "make_held", watched)
    gc.disable()
    try:
        player.sample(Sampling(5), batch_size=2)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_which_models_take_slots(tinystories):
    assert takes_slots(load(tinystories).model)
    assert not takes_slots(load(tinystories, attn_implementation="eager").model)  # its masks are made elsewhere
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    assert not takes_slots(plain)
    assert use_own_attention(plain)
    assert takes_slots(plain)
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=16))
    use_own_attention(windowed)
    assert not takes_slots(windowed)
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    assert SlotLayer not in DYNAMIC_LAYER_TYPE_MAPPING.values()
