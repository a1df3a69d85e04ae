"""Rows that take the next prompt where one has ended: the same answers as batches give, in fewer passes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from onecard.models.attention import use_onecard_attention
from onecard.models.roles import Roles
from onecard.rollout import CachedBatch, PaddedBatch, Sampling, cache_slots, sampler
from onecard.rollout.cache_slots import GROWTH, CacheSlots, SlotLayer, supports_slots
from onecard.rollout.cuda_graphs import capture_function_for, cuda_graph, use_capture_function
from tests.engine.rollout_material import LoadedPolicy, frequent_stop_tokens, load, one_pass_logprobs, recorded_shapes

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def batched(roles: Roles, rows: int, columns: int) -> PaddedBatch:
    return PaddedBatch(roles.causal_model(), rows, roles.device)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 5, 18])
def test_answers_are_those_of_batches(monkeypatch, policy: LoadedPolicy, rows, temperature):
    """Each prompt with draws of its own, so that nothing depends on what stands beside it."""
    prompts, ends = policy.prompts * 3, frequent_stop_tokens(policy)

    def sampled() -> Any:
        return policy.sample(Sampling(40, temperature), prompts, stop_tokens=ends, batch_size=rows, seed=3).responses

    together = sampled()
    monkeypatch.setattr(sampler, "make_decode_batch", batched)
    for one, other in zip(together, sampled(), strict=True):
        assert one.tokens == other.tokens
        assert one.finished == other.finished
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=0)
    assert len({len(response.tokens) for response in together}) > 5


def test_a_row_that_ends_takes_the_next_prompt(monkeypatch, policy: LoadedPolicy):
    """Passes over rows that are nearly full, and far fewer of them than batches take."""
    prompts, ends = policy.prompts * 16, frequent_stop_tokens(policy)

    def passes() -> tuple[list[tuple[int, int]], int]:
        with recorded_shapes(policy.model) as shapes:
            found = policy.sample(Sampling(60), prompts, stop_tokens=ends, batch_size=16, seed=1).responses
        return shapes, sum(len(response.tokens) for response in found)

    shapes, tokens = passes()
    incoming = [rows for rows, columns in shapes if columns > 1]
    assert sum(incoming) == len(prompts)
    assert incoming[0] == 16
    assert len(incoming) > 10
    assert tokens <= sum(rows for rows, _ in shapes) < 1.2 * tokens
    monkeypatch.setattr(sampler, "make_decode_batch", batched)
    in_batches, same = passes()
    assert same == tokens
    assert len(shapes) < 0.75 * len(in_batches)


def test_a_short_prompt_does_not_see_whose_place_it_takes(policy: LoadedPolicy):
    """The longest prompts come first, so that all others stand where something longer has been."""
    torch.manual_seed(0)
    prompts = [policy.prompts[3] * 3, *policy.prompts]
    found = policy.sample(Sampling(30), prompts, stop_tokens=frequent_stop_tokens(policy), batch_size=1).responses
    for prompt, response in zip(prompts, found, strict=True):
        own = one_pass_logprobs(policy, prompt, response, 1.0)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)


def test_no_row_leaves_while_a_prompt_waits(monkeypatch, policy: LoadedPolicy):
    """Where prompts come in by halves, free rows are kept for them."""
    monkeypatch.setattr(cache_slots, "REFILL_SHARE", 0.5)
    with recorded_shapes(policy.model) as shapes:
        policy.sample(Sampling(40), policy.prompts * 4, stop_tokens=frequent_stop_tokens(policy), batch_size=8, seed=2)
    incoming = [index for index, (_, columns) in enumerate(shapes) if columns > 1]
    assert len(incoming) > 3
    assert {rows for rows, columns in shapes[: incoming[-1]] if columns == 1} == {8}
    assert min(rows for rows, _ in shapes[incoming[-1] :]) < 8  # then they leave


class Kept:
    """Records a pass as a GPU would: for inputs that stay where they are, and results that are overwritten."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, run: Any, inputs: dict[str, torch.Tensor]) -> Any:
        out = run(inputs)
        rows, columns = inputs["attention_mask"].shape[0], inputs["attention_mask"].shape[-1]
        self.shapes.append((rows, columns))

        def replay(new: dict[str, torch.Tensor]) -> torch.Tensor:
            for name, batch in inputs.items():
                batch.copy_(new[name])
            out.copy_(run(inputs))
            return out.clone()

        return replay


def test_recorded_passes_give_the_same_answers(monkeypatch, policy: LoadedPolicy):
    """Recorded anew when the cache grows and when rows leave, and at no other time."""
    monkeypatch.setattr(cache_slots, "GROWTH", 32)
    prompts, ends = policy.prompts * 4, frequent_stop_tokens(policy)

    def sampled() -> Any:
        return policy.sample(Sampling(50), prompts, stop_tokens=ends, batch_size=6, seed=5).responses

    plain, recorder = sampled(), Kept()
    with use_capture_function(recorder), recorded_shapes(policy.model) as shapes:
        replayed = sampled()
    for one, other in zip(plain, replayed, strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=0)
    assert len(recorder.shapes) == len(set(recorder.shapes))  # never the same twice
    assert {columns for _, columns in recorder.shapes} >= {32, 64}
    assert recorder.shapes[0] == (6, 32)
    assert len(recorder.shapes) < len(shapes) / 5


def test_after_all_rows_end_the_next_begin_with_new_memory(monkeypatch, policy: LoadedPolicy):
    """No pass over many prompts beside a whole cache; and nothing is replayed into memory that is gone."""
    recorder, taken = Kept(), []
    prefill = CacheSlots.prefill

    def watched(self: CacheSlots, prompts: Any, *given: Any) -> Any:
        taken.append((len(prompts), self.cache is None))
        return prefill(self, prompts, *given)

    monkeypatch.setattr(CacheSlots, "prefill", watched)
    with use_capture_function(recorder):
        found = policy.sample(Sampling(9), policy.prompts * 2, stop_tokens=(), batch_size=4, seed=3).responses
    assert taken == [(4, True)] * 3
    assert len(recorder.shapes) == 3
    plain = policy.sample(Sampling(9), policy.prompts * 2, stop_tokens=(), batch_size=1, seed=3).responses
    assert [one.tokens for one in found] == [one.tokens for one in plain]


def test_few_come_in_beside_a_whole_cache(monkeypatch, policy: LoadedPolicy):
    """However many rows are free: a pass over all of them would be the largest of the rollout."""
    monkeypatch.setattr(cache_slots, "REFILL_SHARE", 0.25)
    sizes = []
    prefill = CacheSlots.prefill

    def watched(self: CacheSlots, prompts: Any, *given: Any) -> Any:
        sizes.append((len(prompts), self.cache is None))
        return prefill(self, prompts, *given)

    monkeypatch.setattr(CacheSlots, "prefill", watched)
    policy.sample(Sampling(40), policy.prompts * 6, stop_tokens=frequent_stop_tokens(policy), batch_size=8, seed=4)
    assert sizes[0] == (8, True)
    assert {count for count, fresh in sizes if not fresh} == {2}


def test_a_row_that_has_ended_may_draw_nothing_finite(monkeypatch, policy: LoadedPolicy):
    """It goes on unseen until it leaves, and what it draws is fed to the model."""
    monkeypatch.setattr(sampler, "COMPACTION_SHARE", 2.0)
    whole = CachedBatch.logits

    def broken(self: CachedBatch) -> torch.Tensor:
        found = whole(self)
        ended = [row for row, index in enumerate(self.row_prompts) if index is None]
        found[ended] = torch.nan
        return found

    def sampled() -> Any:
        return policy.sample(
            Sampling(40), policy.prompts, stop_tokens=frequent_stop_tokens(policy), batch_size=6, seed=6
        ).responses

    plain = sampled()
    monkeypatch.setattr(CachedBatch, "logits", broken)
    assert [one.tokens for one in sampled()] == [one.tokens for one in plain]


def test_what_an_ended_row_left_behind_is_wiped(policy: LoadedPolicy):
    """A newcomer's masked columns have no weight, but no weight times nan is nan."""
    batch = CacheSlots(policy.model, 2, 60, torch.device("cpu"))
    with torch.no_grad():
        batch.prefill([(5, 6, 7), (5, 6, 7)], [0, 1], [0, 1])
        for layer in batch.cache.layers:
            layer.values[1, :, 1:] = torch.nan
        batch.row_prompts[1] = None
        batch.prefill([(8,)], [2], [1])
        batch.append(torch.tensor([4, 4]))
        assert batch.logits().isfinite().all()


def test_a_pass_that_cannot_be_recorded_is_run(capsys, policy: LoadedPolicy):
    tried = []

    def refuses(run: Any, inputs: Any) -> Any:
        tried.append(inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    plain = policy.sample(Sampling(9), batch_size=4, seed=2).responses
    with use_capture_function(refuses):
        found = policy.sample(Sampling(9), batch_size=4, seed=2).responses
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    assert len(tried) == 1
    assert "cannot be captured as a CUDA graph, so it runs eagerly: operation not permitted" in capsys.readouterr().err


def test_memory_that_runs_out_while_recording_is_no_refusal(policy: LoadedPolicy):
    """It goes where all such errors go: fewer rows, from the beginning."""
    sizes = []

    def too_much(run: Any, inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run

    with use_capture_function(too_much):
        found = policy.sample(Sampling(9), batch_size=4, seed=2).responses
    assert sizes[:2] == [4, 2]
    assert [one.tokens for one in found] == [
        one.tokens for one in policy.sample(Sampling(9), batch_size=2, seed=2).responses
    ]


def test_passes_are_recorded_on_a_gpu_where_one_asks_for_it(monkeypatch):
    assert capture_function_for(torch.device("cuda")) is None
    monkeypatch.setenv("ONECARD_ROLLOUT_GRAPHS", "1")
    assert capture_function_for(torch.device("cuda")) is cuda_graph
    assert capture_function_for(torch.device("cpu")) is None
    assert capture_function_for(torch.device("meta")) is None
    with use_capture_function(None):
        assert capture_function_for(torch.device("cuda")) is None


def test_memory_grows_no_further_than_the_longest_row_s_end(policy: LoadedPolicy):
    length = GROWTH * 2 + 5
    batch = CacheSlots(policy.model, 2, length - 1, torch.device("cpu"))
    taken = []
    for index, _ in zip(range(length - 1), run(batch, policy, length), strict=False):
        taken.append((index, batch.cache.layers[0].keys.shape[2]))
    capacities = sorted({columns for _, columns in taken})
    assert capacities == [GROWTH, 2 * GROWTH, length - 1]


def run(batch: CacheSlots, policy: LoadedPolicy, length: int) -> Any:
    """Token after token of one row; the other one has no prompt."""
    logits = batch.prefill([policy.prompts[0]], [0], [0])
    for _ in range(length - 1 - len(policy.prompts[0])):  # a column each
        batch.append(torch.tensor([5]) if len(logits) == 1 else torch.tensor([5, 6]), [0] if len(logits) == 1 else None)
        logits = batch.logits()
        assert logits.isfinite().all()
        yield logits


def test_what_was_never_written_is_zero():
    """Masked keys have no weight, but no weight times nan is nan."""
    layer = SlotLayer(
        CacheSlots(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), 3, 300, torch.device("cpu")).layout, 3
    )
    layer.layout.grow(7)
    new = torch.full((2, 4, 7, 8), torch.nan)
    grown = layer.with_capacity(None, new)
    assert grown.shape == (3, 4, GROWTH, 8)
    assert not grown.any()
    layer.layout.grow(200)
    again = layer.with_capacity(grown + 1, new)
    assert again.shape == (3, 4, 2 * GROWTH, 8)
    assert (again[:, :, :GROWTH] == 1).all()
    assert not again[:, :, GROWTH:].any()


def test_the_cache_is_gone_when_sampling_is_over(monkeypatch, policy: LoadedPolicy):
    """At once, without the collector: the next phase begins with all memory."""
    kept = []
    make = sampler.make_decode_batch

    def watched(*given: Any) -> Any:
        batch = make(*given)
        assert isinstance(batch, CacheSlots)
        kept.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(sampler, "make_decode_batch", watched)
    gc.disable()
    try:
        policy.sample(Sampling(5), batch_size=2)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_which_models_take_slots(tinystories):
    assert supports_slots(load(tinystories).model)
    assert not supports_slots(load(tinystories, attn_implementation="eager").model)  # its masks are made elsewhere
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    assert not supports_slots(plain)
    assert use_onecard_attention(plain)
    assert supports_slots(plain)
    for kind in ("dynamic", "longrope"):  # whose rotations depend on what stands beside a row
        stretched = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
        use_onecard_attention(stretched)
        stretched.config.rope_parameters = {**stretched.config.rope_parameters, "rope_type": kind}
        assert not supports_slots(stretched)
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=16))
    use_onecard_attention(windowed)
    assert not supports_slots(windowed)
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    assert SlotLayer not in DYNAMIC_LAYER_TYPE_MAPPING.values()
