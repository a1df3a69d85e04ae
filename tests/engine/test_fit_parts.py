"""The parts of `onecard fit`: counting, quantized layers, cards, and the search for settings."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig

from onecard.commands.fit.cards import CARDS, GIB, Card, find_card, smallest_card
from onecard.commands.fit.model import read_config
from onecard.commands.fit.phases import Lengths, largest_pass
from onecard.commands.fit.plan import (
    MemoryPlan,
    plan_memory,
    plan_once,
    planning,
    runs_token_by_token,
    target_attention,
)
from onecard.commands.fit.search import largest_micro_batch_tokens, search_settings
from onecard.commands.fit.tracker import ACTIVATIONS, PAGED, Phase, Tracker
from onecard.commands.fit.weights import META, nf4_weight
from onecard.commands.fit.workspaces import workspaces
from onecard.config import DPOConfig, PPOConfig, SFTConfig
from onecard.utils.errors import OnecardError
from tests.models.families import FAMILIES, config_of

CUDA = torch.device("cuda")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def test_births_and_deaths_are_counted_in_the_allocators_steps():
    tracker = Tracker(CUDA, {})
    with tracker, tracker.phase("all") as phase:
        first = meta(1000)  # 4000 bytes are 8 steps of 512
        view = first.view(10, 100)
        assert tracker.current == 4096
        second = first + 1
        assert tracker.current == 2 * 4096
        del first
        assert tracker.current == 2 * 4096  # the view holds it
        del view, second
        assert tracker.current == 0
    assert (phase.peak, phase.before, phase.parts) == (2 * 4096, 0, {ACTIVATIONS: 2 * 4096})


def test_known_shapes_are_those_of_the_operators():
    """From the second call on results are looked up; a result that shares its argument's storage never is."""
    tracker = Tracker(torch.device("cpu"), {})
    with tracker:
        for _ in range(3):
            x = meta(6, 8)
            assert (x.t() @ x).shape == (8, 8)
            assert (x + 1).stride() == (8, 1)
            assert x.sum(0).shape == (8,)
            assert x.sum(1).shape == (6,)
            assert (x.half() * 2).dtype == torch.float16
            assert torch.ops.aten._unsafe_view(x, [48]).untyped_storage() is x.untyped_storage()
            assert [each.shape for each in x.split([2, 4])] == [(2, 8), (4, 8)]


def test_backward_passes_are_seen():
    tracker = Tracker(torch.device("cpu"), {})
    with tracker:
        x, weight = meta(100, 64), meta(64, 64).requires_grad_()
        loss = torch.tanh(x @ weight).sum()
        assert tracker.current == (2 * 100 * 64 + 64 * 64 + 1) * 4  # x, what tanh saved, the weight, the loss
        with tracker.phase("backward") as phase:
            loss.backward()
    assert phase.peak - phase.before == (100 * 64 + 1) * 4  # the product's gradient, and the loss's
    assert tracker.current == (100 * 64 + 2 * 64 * 64 + 1) * 4  # what was saved is gone, the weight's gradient is there


def test_an_operators_workspace_is_on_top_while_it_runs():
    tracker = Tracker(CUDA, {"aten::mm": lambda target, a, b: 10_000})
    with tracker:
        a = meta(128, 128)
        with tracker.phase("product") as phase:
            a @ a
    assert phase.peak == 2 * 128 * 128 * 4 + 10_000
    assert phase.peak_operator == "aten::mm"
    assert tracker.current == 128 * 128 * 4


def test_what_pages_out_is_not_among_what_is_allocated():
    tracker = Tracker(CUDA, {})
    with tracker, tracker.allocating(PAGED), tracker.phase("all") as phase:
        kept = meta(1024)
    assert (phase.peak, tracker.by_kind[PAGED]) == (0, kept.numel() * 4)


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (100, 130), (640, 256)])
def test_nf4_layers_take_what_bitsandbytes_holds(rows, columns):
    from bitsandbytes.nn import Linear4bit, Params4bit

    real = Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=True)
    real.weight = Params4bit(torch.randn(rows, columns), requires_grad=False, quant_type="nf4").to("cpu")
    with META:
        planned = Linear4bit(columns, rows, bias=False, quant_type="nf4")
    planned.weight = nf4_weight(planned, torch.float32)

    def tensors(weight):
        state = weight.quant_state
        return [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]

    for real_one, planned_one in zip(tensors(real.weight), tensors(planned.weight), strict=True):
        assert (real_one.shape, real_one.dtype) == (planned_one.shape, planned_one.dtype)
        assert planned_one.is_meta


def test_a_4_bit_layer_unpacks_its_weight_for_many_rows():
    table = workspaces()["bitsandbytes::gemm_4bit"]
    weight = (meta(64 * 128 // 2, 1, dtype=torch.uint8), [64, 128], meta(1), 64, "nf4")
    assert table(CUDA, meta(1, 100, 128, dtype=torch.bfloat16), *weight) == 64 * 128 * 2 + 2 * 128 * 4
    assert table(CUDA, meta(4, 1, 128, dtype=torch.bfloat16), *weight) == 0


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_makes_no_matrix_of_all_pairs(target, masked):
    """128 MiB of logits in fp32 at this size; a mask has one row of heads for all."""
    device = torch.device(target)
    tracker = Tracker(device, {})
    query = meta(1, 32, 1024, 64, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool, device=META) if masked else None
    with planning(device, tracker), torch.no_grad(), tracker.phase("attention") as phase:
        out = functional.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=not masked)
    assert out.shape == query.shape
    assert phase.peak < 16 << 20


def test_attention_outside_of_meta_is_pytorchs():
    query = torch.randn(1, 2, 8, 4)
    own = functional.scaled_dot_product_attention
    with target_attention(CUDA):
        found = functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert functional.scaled_dot_product_attention is own
    assert torch.equal(found, own(query, query, query, is_causal=True))


def peaks(**settings) -> dict[str, int]:
    """Peaks of a DPO plan for a small Llama, by phase."""
    model = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    plan = plan_memory(model, DPOConfig(model="x", **settings), Lengths(48, 16), CUDA)
    return {"weights": plan.parameters, **{phase.name: phase.peak for phase in plan.phases}}


def test_a_whole_model_as_reference_is_in_the_plan():
    """Of all weights in float32 the copy is one too; a loss without a reference has none, a known one lets it go."""
    with_copy, without = peaks(use_peft=False), peaks(use_peft=False, loss_type=["simpo"])
    assert with_copy["weights"] == 2 * without["weights"]
    known = peaks(use_peft=False, precompute_ref_log_probs=True)
    assert known["load"] == with_copy["load"]
    assert known["optimizer step"] == without["optimizer step"]
    assert known["reference pass"] > with_copy["weights"]


def test_only_kto_runs_mismatched_answers():
    assert peaks(loss_type=["apo_zero_unpaired"])["train"] < peaks(loss_type=["kto"])["train"]


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_free": False},
        {"attn_implementation": "sdpa"},
        {"dtype": "float32"},
        {"use_peft": False},
    ],
)
def test_checkpointed_layers_are_recomputed_as_they_were_run(settings):
    assert peaks(**settings, gradient_checkpointing=True)["train"] < peaks(**settings)["train"]


@pytest.mark.parametrize(
    ("said", "name", "gib"),
    [
        ("24GB", "24 GiB", 24),
        ("11.5GiB", "11.5 GiB", 11.5),
        ("12", "12 GiB", 12),
        ("RTX 3060", "RTX 3060", 12),
        ("rtx3060", "RTX 3060", 12),
        ("4090", "RTX 4090", 24),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti", 16),
        ("a100-80gb", "A100 80GB", 80),
    ],
)
def test_cards_by_size_and_name(said, name, gib):
    assert find_card(said) == Card(name, int(gib * GIB))


@pytest.mark.parametrize("said", ["0", "0GB", "0.0 GiB"])
def test_a_card_without_memory_is_refused(said):
    with pytest.raises(OnecardError, match=r"card: .*expected a size above 0"):
        find_card(said)


def test_an_unknown_card_is_refused_with_those_that_are_known():
    with pytest.raises(OnecardError, match=r"no card is called 'RTX 3061'.*Did you mean 'RTX 3060'\?"):
        find_card("RTX 3061")


def test_a_12_gb_card_gives_a_run_about_11_gib():
    card = find_card("12GB")
    assert card.holds(int(10.4 * GIB))
    assert not card.holds(int(10.6 * GIB))
    assert smallest_card(int(10.4 * GIB)).memory == 12 * GIB
    assert smallest_card(int(1e12)) is None
    assert max(CARDS.values()) == 80


def a_plan(peak: float) -> MemoryPlan:
    return MemoryPlan(0, 0, (Phase("train", 0, int(peak)),), 0, 0.0)


def straight(config) -> MemoryPlan:
    """1 GiB, and 1 MiB for each token; half of that checkpointed, and a GiB less with a small optimizer."""
    tokens = config.micro_batch_tokens or 8 * 1024
    per_token = 2**20 / (2 if config.gradient_checkpointing else 1)
    return a_plan(GIB * (2 if config.optim == "adamw_torch" else 1) + tokens * per_token)


def test_levers_are_pulled_in_order_until_it_fits():
    found = search_settings(SFTConfig(), straight, Card("card", 7 * GIB), 1024)
    assert found.changed == {"gradient_checkpointing": True, "optim": "paged_adamw_8bit"}
    assert found.plan.peak == 5 * GIB
    found = search_settings(SFTConfig(), straight, Card("card", 3 * GIB), 1024)
    assert found.changed["micro_batch_tokens"] == 1024
    found = search_settings(SFTConfig(), straight, Card("card", GIB), 1024)
    assert found.config is None


def test_the_largest_budget_fits_and_one_example_more_does_not():
    card, config = Card("card", 8 * GIB), DPOConfig(optim="adamw_8bit")
    tokens = largest_micro_batch_tokens(config, straight, card, 512, 100)
    assert tokens % 512 == 0
    assert card.holds(straight(replace(config, micro_batch_tokens=tokens)).peak)
    assert not card.holds(straight(replace(config, micro_batch_tokens=tokens + 512)).peak)
    assert largest_micro_batch_tokens(config, straight, Card("card", 80 * GIB), 512, 100) == 512 * 100
    assert largest_micro_batch_tokens(config, straight, Card("card", GIB), 512, 100) is None


def test_the_largest_budget_below_another_phase_s_peak():
    def bent(config) -> MemoryPlan:
        return a_plan(max(4 * GIB, straight(config).peak))

    card, config = Card("card", 8 * GIB), DPOConfig(optim="adamw_8bit")
    tokens = largest_micro_batch_tokens(config, bent, card, 512, 100)
    assert card.holds(bent(replace(config, micro_batch_tokens=tokens)).peak)
    assert tokens >= 0.9 * largest_micro_batch_tokens(config, straight, card, 512, 100)


def test_the_largest_budget_where_the_line_has_a_bend():
    """A step of eight examples grows no further, and would not fit; passes without gradients go on, slowly."""

    def saturated(config) -> MemoryPlan:
        count = config.micro_batch_tokens / 1024
        return a_plan(GIB * max(6 + 0.6 * min(count, 8), 6 + 0.15 * count))

    tokens = largest_micro_batch_tokens(PPOConfig(), saturated, Card("card", int(11.2 * GIB)), 1024, 32)
    assert tokens in (5 * 1024, 6 * 1024)  # 9.7 GiB is the limit


def test_rows_of_an_example():
    lengths = Lengths(96, 32)
    assert largest_pass(SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3), lengths) == (128, 6)
    assert largest_pass(DPOConfig(), lengths) == (96 + 2 * 32, 8)
    assert largest_pass(DPOConfig(share_prompts=False), lengths) == (2 * 128, 8)
    assert largest_pass(PPOConfig(batch_size=16), lengths) == (128, 16)


def test_nothing_is_left_of_a_tracker():
    tracker = Tracker(CUDA, {})
    with tracker:
        x = meta(64).requires_grad_()
        (x * 2).sum().backward()
    del x
    gc.collect()
    assert (tracker.current, tracker.storages) == (0, {})


@pytest.mark.parametrize(("family", "by_token"), [("rwkv", True), ("jamba", True), ("llama", False), ("mamba2", False)])
def test_which_models_run_token_by_token(family, by_token):
    config = config_of(FAMILIES[family])
    assert runs_token_by_token(config, SFTConfig(), CUDA) == by_token


def test_a_plan_from_short_texts_is_that_of_long_ones(capsys):
    """A recurrence holds so much a token; 5 % is the bar of plans against measured runs."""
    model = config_of(FAMILIES["jamba"])
    config = PPOConfig(response_length=40, head_chunk_tokens=8, lora_target_modules=["in_proj"], micro_batch_tokens=160)
    on_from_short = plan_memory(model, config, Lengths(40, 40), CUDA)
    assert "loops over tokens" in capsys.readouterr().err
    whole = plan_once(model, config, Lengths(40, 40), CUDA)
    assert [phase.name for phase in on_from_short.phases] == [phase.name for phase in whole.phases]
    for one, other in zip(on_from_short.phases, whole.phases, strict=True):
        assert one.peak == pytest.approx(other.peak, rel=0.05)


def test_infinities_are_read_as_transformers_writes_them(tmp_path):
    config_of(FAMILIES["mamba2"]).save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    assert read_config(tmp_path / "config.json").time_step_limit == [0.0, float("inf")]
