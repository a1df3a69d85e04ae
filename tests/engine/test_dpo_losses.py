"""Every preference loss that `onecard dpo` offers runs; what cannot work is one line, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from onecard.algorithms import dpo
from onecard.algorithms.dpo.command import balance_notes
from onecard.config import DPOConfig
from onecard.data import load_rows
from onecard.data.batches import TokenSequence, pack, pack_labelled, pack_pairs, slice_sequences
from onecard.models.load import load_tokenizer
from onecard.training.metrics import MetricsWindow, divide_sums_by_counts, sum_metrics
from onecard.utils.errors import OnecardError
from onecard_kernels import Loss
from onecard_kernels.dpo.losses import LOSSES, WHOLE_BATCH
from tests.engine.dpo_material import LABELLED, PAIRS, labelled_rows, load, moved


@pytest.fixture(scope="module")
def fresh(tiny_model):
    """Before the first step, where the policy is the reference."""
    return load(tiny_model)


@pytest.fixture(scope="module")
def roles(tiny_model):
    return moved(load(tiny_model))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_goes_through_the_engine(roles, loss_type):
    """In two micro-batches it is the whole batch's, or for what sorts a batch the mean of two batches'."""
    config = DPOConfig(loss_type=[loss_type], label_smoothing=0.1)
    keywords = dpo.loss_keywords(config)
    whole = dpo.preference_loss(roles, pack_pairs(PAIRS), keywords, 4)
    assert whole.loss.requires_grad
    cut = [dpo.preference_loss(roles, pack_pairs(part), keywords, 4) for part in (PAIRS[:1], PAIRS[1:])]
    parts = sum_metrics([Loss(part.loss.detach(), part.metrics) for part in cut])
    expected = {"loss": whole.loss.item(), **{name: value.item() for name, value in whole.metrics.items()}}
    if loss_type in WHOLE_BATCH:
        alone = [dpo.preference_loss(roles, pack_pairs(part), keywords, len(part)) for part in (PAIRS[:1], PAIRS[1:])]
        expected["loss"] = (alone[0].loss.item() + 3 * alone[1].loss.item()) / 4
    assert parts == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo", "cpo"])
def test_losses_without_a_reference_add_up_and_ask_no_reference(roles, loss_type, monkeypatch):
    monkeypatch.delitem(roles.adapters, "reference")
    recipe = dpo.make_recipe(DPOConfig(loss_type=[loss_type]))
    assert not recipe.reference
    whole = recipe.loss(roles, pack_pairs(PAIRS), 4)
    cut = [recipe.loss(roles, pack_pairs(part), 4) for part in (PAIRS[:1], PAIRS[1:])]
    parts = sum_metrics([Loss(part.loss.detach(), part.metrics) for part in cut])
    assert parts == pytest.approx(sum_metrics([Loss(whole.loss.detach(), whole.metrics)]), rel=1e-5, abs=1e-6)


def test_labelled_metrics_are_means_over_their_kind_in_any_cut(roles):
    """Three desirable answers and two others: pieces of one kind alone change nothing but kl, which is each piece's."""
    examples = [replace(one, mismatched=TokenSequence((), ())) for one in LABELLED]
    recipe = dpo.make_recipe(DPOConfig(loss_type=["apo_zero_unpaired"]))
    kinds = [[one for one in examples if one.desirable is kind] for kind in (True, False)]
    assert [len(kind) for kind in kinds] == [3, 2]
    rows = [
        divide_sums_by_counts(sum_metrics([recipe.loss(roles, pack_labelled(part), 5) for part in parts]))
        for parts in ([examples], kinds, [examples[:1], examples[1:]])
    ]
    assert set(rows[0]) == {
        "loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected",
    }  # fmt: skip
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-5, abs=1e-6)
    alone = [divide_sums_by_counts(sum_metrics([recipe.loss(roles, pack_labelled(kind), len(kind))])) for kind in kinds]
    for side, row in zip(("chosen", "rejected"), alone, strict=True):
        assert set(row) == {"loss", "kl", f"rewards/{side}", f"logps/{side}"}
        assert row[f"rewards/{side}"] == pytest.approx(rows[0][f"rewards/{side}"], rel=1e-5, abs=1e-6)


def test_a_window_of_several_steps_has_means_over_answers():
    """Two desirable answers in one step, one in the next, none in the third."""
    window = MetricsWindow()
    for total, chosen, rejected in ((4.0, 1.0, 0.0), (1.0, 0.5, 0.5), (0.0, 0.0, 1.0)):
        window.add({"rewards/chosen_sum": total, "count/chosen": chosen, "count/rejected": rejected, "loss": 1.0})
    assert window.take() == {"rewards/chosen": pytest.approx(5.0 / 1.5), "loss": 1.0}


def test_a_part_of_a_record_is_the_record_of_those_sequences():
    sequences = [one.sequence for one in LABELLED] + [TokenSequence((), ())]
    whole = pack(sequences)
    for start, stop in ((0, 2), (2, 5), (4, 6), (5, 6)):
        cut, alone = slice_sequences(whole, start, stop), pack(sequences[start:stop])
        assert (cut.lengths, cut.num_targets) == (alone.lengths, alone.num_targets)
        for ours, theirs in ((cut, alone), (cut.targets, alone.targets)):
            for item in fields(ours):
                if isinstance(getattr(ours, item.name), torch.Tensor):
                    assert torch.equal(getattr(ours, item.name), getattr(theirs, item.name)), item.name


def test_only_kto_keeps_the_mismatched_answers(tiny_model, tmp_path):
    rows = load_rows(str(labelled_rows(tmp_path / "rows.jsonl", 9)), split="train")
    tokenizer = load_tokenizer(DPOConfig(model=str(tiny_model)))
    found = {
        name: dpo.make_recipe(DPOConfig(loss_type=[name])).tokenize(rows, tokenizer, 64)
        for name in ("kto", "apo_zero_unpaired")
    }
    assert all(len(one.mismatched) > 4 for one in found["kto"].examples)
    for one, other in zip(found["kto"].examples, found["apo_zero_unpaired"].examples, strict=True):
        assert other == replace(one, mismatched=TokenSequence((), ()))
    alone = dpo.make_recipe(DPOConfig(loss_type=["apo_zero_unpaired"])).tokenize(rows[:1], tokenizer, 64)
    assert alone.examples == found["apo_zero_unpaired"].examples[:1]
    assert [one.desirable for one in found["kto"].examples] == [True, False] * 4 + [True]
    assert sum("desirable_weight of" in note for note in found["kto"].notes) == 0  # 5 to 4 is within 4 to 3
    lopsided = [row for row, one in zip(rows, found["kto"].examples, strict=True) if one.desirable] + rows[1:2]
    notes = dpo.make_recipe(DPOConfig(loss_type=["kto"])).tokenize(lopsided, tokenizer, 64).notes
    assert sum("desirable_weight of 0.2 to 0.267" in note for note in notes) == 1


START = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "aot", "aot_unpaired"), math.log(2)),
    "discopop": 0.5 * math.log(2) + 0.5,
    "hinge": 1.0,
    "ipo": 0.25 / 0.3**2,
    "robust": math.log(2),
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * 0.25 / 0.3**2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}


@pytest.mark.parametrize("loss_type", START)
def test_where_policy_and_reference_are_equal_the_loss_is_known(fresh, loss_type):
    """Exactly, but for the rounding of the constant: both roles run the same operations on the same tokens."""
    recipe = dpo.make_recipe(DPOConfig(loss_type=[loss_type], beta=0.3, label_smoothing=0.1))
    loss = recipe.loss(fresh, pack_pairs(PAIRS), 4)
    assert loss.loss.item() == pytest.approx(START[loss_type], rel=1e-6)
    rewards = {name: value.item() for name, value in loss.metrics.items() if name.startswith("rewards/")}
    assert rewards == dict.fromkeys(rewards, 0.0)
    assert len(rewards) == 4


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_labelled_answers_start_at_a_half(fresh, loss_type):
    recipe = dpo.make_recipe(DPOConfig(loss_type=[loss_type], desirable_weight=2.0))
    loss = recipe.loss(fresh, pack_labelled(LABELLED), 5)
    assert loss.loss.item() == pytest.approx((3 * 2.0 + 2 * 1.0) / 2 / 5, rel=1e-6)
    row = divide_sums_by_counts(sum_metrics([loss]))
    assert (row["kl"], row["rewards/chosen"], row["rewards/rejected"], row["rewards/margins"]) == (0.0,) * 4


def test_wpo_starts_at_log_2_times_the_mean_weight(fresh):
    """By hand, from the whole distributions: w = exp(mean over tokens of log p(y) - log sum p^2), both answers'."""
    loss = dpo.make_recipe(DPOConfig(use_weighting=True)).loss(fresh, pack_pairs(PAIRS), 4)
    weights = []
    for pair in PAIRS:
        m = 0.0
        for one in (pair.chosen, pair.rejected):
            ids = torch.tensor([one.tokens])
            logprobs = fresh.causal_model()(input_ids=ids).logits[0, 1:-1].double().log_softmax(-1)
            answers = logprobs.gather(-1, ids[0, 2:, None]).squeeze(-1)
            m += (answers - logprobs.exp().square().sum(-1).log()).mean().item()
        weights.append(math.exp(m))
    assert loss.loss.item() == pytest.approx(math.log(2) * sum(weights) / 4, rel=1e-5)
    assert min(weights) < 0.9


def test_lopsided_labels_are_named_with_the_advised_weight():
    """Four desirable answers to one other: a weight of 1/4 to 1/3."""
    examples = [replace(LABELLED[0], desirable=i != 2) for i in range(5)]
    (note,) = balance_notes(examples, DPOConfig())
    assert "desirable_weight of 0.25 to 0.333" in note
    assert balance_notes(examples, DPOConfig(desirable_weight=0.3)) == ()
    assert balance_notes(examples[:2], DPOConfig()) == ()


BAD = {
    "simpo with a sum": ({"loss_type": ["sigmoid", "simpo"]}, ("loss_type: simpo cannot be summed",)),
    "two that cannot be summed": ({"loss_type": ["kto", "orpo"]}, ("loss_type: kto cannot be summed",)),
    "weights of one that cannot be summed": (
        {"loss_type": ["kto"], "loss_weights": [1.0]},
        ("loss_weights: [1.0]", "loss_type kto"),
    ),
    "a loss that there is not": ({"loss_type": ["sigmoidal"]}, ("loss_type", "'sigmoidal'", "'sigmoid'")),
    "a reference for a loss without": (
        {"loss_type": ["simpo"], "ref_adapter": "somewhere"},
        ("ref_adapter: 'somewhere'", "simpo"),
    ),
    "a reference pass for a loss without": (
        {"loss_type": ["orpo"], "precompute_ref_log_probs": True},
        ("precompute_ref_log_probs", "orpo"),
    ),
    "WPO of labelled answers": ({"loss_type": ["kto"], "use_weighting": True}, ("use_weighting", "kto")),
    "WPO of a sorted batch": ({"loss_type": ["aot"], "use_weighting": True}, ("use_weighting", "aot")),
    "another loss's setting": ({"simpo_gamma": 0.7}, ("simpo_gamma: 0.7", "sigmoid")),
    "a divergence of a loss without reference": (
        {"loss_type": ["cpo"], "f_divergence_type": "forward_kl"},
        ("f_divergence_type", "cpo"),
    ),
    "simpo's smoothing beyond half": (
        {"loss_type": ["simpo"], "label_smoothing": 0.7},
        ("label_smoothing is 0.7",),
    ),
    "simpo with a margin below 0": ({"loss_type": ["simpo"], "simpo_gamma": -0.5}, ("simpo_gamma is -0.5",)),
    "kto at beta 0": ({"loss_type": ["kto"], "beta": 0.0}, ("beta is 0.0",)),
    "aot in micro-batches": (
        {"loss_type": ["sigmoid", "aot"], "gradient_accumulation_steps": 2},
        ("gradient_accumulation_steps is 2", "1 with loss_type aot", "whole batch"),
    ),
    "aot_unpaired in micro-batches": (
        {"loss_type": ["aot_unpaired"], "gradient_accumulation_steps": 4},
        ("gradient_accumulation_steps is 4", "aot_unpaired"),
    ),
    "exo_pair without smoothing": ({"loss_type": ["exo_pair"]}, ("label_smoothing is 0.0", "above 0", "exo_pair")),
    "robust at half": (
        {"loss_type": ["robust"], "label_smoothing": 0.5},
        ("label_smoothing is 0.5", "below 0.5", "robust"),
    ),
    "a loss of single responses under a divergence": (
        {"loss_type": ["bco_pair"], "f_divergence_type": "js_divergence"},
        ("f_divergence_type is 'js_divergence'", "'reverse_kl'", "bco_pair"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_one_line(case):
    settings, words = BAD[case]
    with pytest.raises(OnecardError) as caught:
        dpo.run(DPOConfig(**settings))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_command_refuses_before_it_loads_anything(onecard, tmp_path):
    result = onecard(
        "dpo", "--model", tmp_path / "none", "--dataset", tmp_path / "none.jsonl", "--output_dir", tmp_path / "run",
        "--loss_type", "aot", "--gradient_accumulation_steps", 2,
    )  # fmt: skip
    assert result.code != 0
    assert [line for line in result.err.splitlines() if "gradient_accumulation_steps is 2" in line] != []
    assert list(tmp_path.iterdir()) == []
