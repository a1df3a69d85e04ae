"""Every preference loss, from tokens through the model to the gradient of its weights, against TRL's own trainers.

Both sides have the same tiny model in fp32, one packed, the other padded. Answers' log-probs are tens of nats, sums of
about ten products of fp32: the two sides' differ by some units in the last place of 64, which is 8e-6. A loss's slope
in a log-prob is at most a few, and its gradient is as exact, relative to the largest entry.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.algorithms import dpo
from onecard.algorithms.dpo.losses import reference_logps, sequence_logps
from onecard.algorithms.dpo.variants import pick_variant
from onecard.config import DPOConfig
from onecard.data.batches import LabelledSequence, PreferencePair, TokenSequence, pack, pack_labelled, pack_pairs
from onecard.models.roles import Roles
from onecard.training.metrics import divide_sums_by_counts, sum_metrics
from onecard_kernels import Loss
from onecard_kernels.dpo.losses import ANY_DIVERGENCE, LOSSES
from tests.engine.dpo_material import LABELLED, LEVEL, load, moved, text

pytest.importorskip("trl", reason="compares with TRL's own code")

CLOSE = 5e-5


@pytest.fixture(scope="module")
def roles(tiny_model: Path) -> Roles:
    """All weights trained, so that a Hugging Face model can have the same ones."""
    return moved(load(tiny_model, use_peft=False), by=0.02).train()


@pytest.fixture(scope="module")
def models(roles: Roles) -> tuple[Any, Any]:
    """TRL's policy and reference: the same weights."""
    from trl.trainer.utils import add_fused_lm_head

    policy, reference = copy.deepcopy(roles.model), copy.deepcopy(roles.copies["reference"])
    for model in (policy, reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    return policy, reference


def trainer(kind: type, policy: Any, reference: Any = None, **settings: Any) -> Any:
    """One of TRL's trainers without its loop: the loss's own methods, on settings that are given."""
    made = object.__new__(kind)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    made.__dict__.update(
        model=policy,
        ref_model=reference,
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("discopop_tau", 0.05)),
        **settings,
    )
    return made


def padded(sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """TRL's three tensors [S, T], padded on the right."""
    longest = max(map(len, sequences))

    def rows(values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*value, *[0] * (longest - len(value))] for value in values])

    return {
        "input_ids": rows([sequence.tokens for sequence in sequences]),
        "attention_mask": rows([[1] * len(sequence) for sequence in sequences]),
        "completion_mask": rows([sequence.response_mask for sequence in sequences]),
    }


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad])


def ours(roles: Roles, config: DPOConfig, examples: Sequence[Any]) -> Loss:
    """The loss as a training step computes it."""
    recipe = dpo.make_recipe(config)
    return recipe.loss(roles, recipe.collate(examples), len(examples))


def assert_equal(roles: Roles, mine: Loss, policy: Any, theirs: Tensor) -> None:
    """Loss and gradient of all weights."""
    assert mine.loss.item() == pytest.approx(theirs.item(), rel=CLOSE, abs=CLOSE)
    my_gradient, their_gradient = gradient(roles.model, mine.loss), gradient(policy, theirs)
    scale = their_gradient.abs().max().item()
    assert scale > 1e-3
    assert (my_gradient - their_gradient).abs().max().item() <= CLOSE * scale


SMOOTHING = {"robust": 0.125, "exo_pair": 0.25, "aot": 0.125, "aot_unpaired": 0.125}  # elsewhere TRL ignores it
DIVERGENCES = [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.5), ("alpha_divergence", 2.0)]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name], "label_smoothing": SMOOTHING.get(name, 0.0)} for name in LOSSES},
    **{
        f"{name}, {kind}, {alpha}": {
            "loss_type": [name],
            "label_smoothing": SMOOTHING.get(name, 0.0),
            "f_divergence_type": kind,
            "f_alpha_divergence_coef": alpha,
        }
        for name in sorted(ANY_DIVERGENCE - {"sft"})
        for kind, alpha in DIVERGENCES
    },
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "discopop, tau": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "WPO": {"loss_type": ["sigmoid"], "use_weighting": True},
    "WPO, several": {"loss_type": ["ipo", "nca_pair"], "loss_weights": [0.5, 2.0], "use_weighting": True},
}


@pytest.mark.parametrize("case", CASES)
def test_pairs_against_a_reference(roles, models, case):
    from trl import DPOTrainer

    settings = {"beta": 0.25, **CASES[case]}
    policy, reference = models
    config = DPOConfig(use_peft=False, **settings)
    theirs = trainer(
        DPOTrainer,
        policy,
        reference,
        beta=config.beta,
        loss_types=config.loss_type,
        loss_weights=config.loss_weights or [1.0],
        label_smoothing=config.label_smoothing,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        discopop_tau=config.discopop_tau,
        use_weighting=config.use_weighting,
        ld_alpha=None,
        precompute_ref_logps=False,
    )
    inputs = padded([pair.chosen for pair in LEVEL] + [pair.rejected for pair in LEVEL])
    their_loss = theirs._compute_loss(policy, inputs, False)
    mine = ours(roles, config, LEVEL)
    assert_equal(roles, mine, policy, their_loss)
    names = {f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")}
    names |= {"logps/chosen", "logps/rejected"}
    assert set(mine.metrics) == names
    for name in names:
        assert mine.metrics[name].item() == pytest.approx(theirs._metrics["train"][name][0], abs=4 * CLOSE), name
    assert abs(mine.metrics["rewards/margins"].item()) > 0.01


def test_wpo_weighs_pairs_apart(roles):
    """Or the comparison above would show nothing."""
    plain, weighted = (ours(roles, DPOConfig(use_weighting=on), LEVEL).loss.item() for on in (False, True))
    assert weighted < 0.9 * plain


FREE: dict[str, dict[str, Any]] = {
    "simpo": {"loss_type": ["simpo"], "simpo_gamma": 0.3},
    "simpo, smoothed": {"loss_type": ["simpo"], "label_smoothing": 0.1},
    "cpo": {"loss_type": ["cpo"], "cpo_alpha": 0.7},
    "cpo, no likelihood, smoothed": {"loss_type": ["cpo"], "cpo_alpha": 0.0, "label_smoothing": 0.1},
    "orpo": {"loss_type": ["orpo"]},
}
TRL_FREE = {"simpo": ("cpo", "simpo"), "cpo": ("cpo", "sigmoid"), "orpo": ("orpo", "")}


def free_trainer(config: DPOConfig, policy: Any) -> Any:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    module, name = TRL_FREE[config.loss_type[0]]
    more = {"pad_token_id": 0, "padding_value": 0, "is_encoder_decoder": False, "beta": config.beta}
    if module == "orpo":
        return trainer(ORPOTrainer, policy, **more)
    return trainer(
        CPOTrainer,
        policy,
        loss_type=name,
        alpha=0.0,
        # SimPO is CPO's without its likelihood
        cpo_alpha=0.0 if name == "simpo" else config.cpo_alpha,
        simpo_gamma=config.simpo_gamma,
        label_smoothing=config.label_smoothing,
        **more,
    )


@pytest.mark.parametrize("case", FREE)
def test_pairs_without_a_reference(roles, models, case):
    config = DPOConfig(use_peft=False, beta=0.4, **FREE[case])
    policy = models[0]
    # ORPO's likelihood is of the prompt too in TRL: a prompt of one token, which nothing predicts, leaves it out.
    pairs = [PreferencePair(text(5, 50 + i, 1), text(2 + 2 * i, 60 + i, 1)) for i in range(4)]
    batch: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        inputs = padded([getattr(pair, side) for pair in pairs])
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        batch |= {
            f"{side}_input_ids": inputs["input_ids"],
            f"{side}_attention_mask": inputs["attention_mask"],
            f"{side}_labels": labels,
        }
    theirs, metrics = free_trainer(config, policy).get_batch_loss_metrics(policy, batch)
    assert pick_variant(config).compute_ref_logps is None
    mine = ours(roles, config, pairs)
    assert_equal(roles, mine, policy, theirs)
    assert set(mine.metrics) <= set(metrics)
    assert {"rewards/margins", "logps/chosen", "logps/rejected"} <= set(mine.metrics)
    for name, value in mine.metrics.items():
        if name != "nll_loss" or config.cpo_alpha:  # TRL says 0 where it is not asked for
            assert value.item() == pytest.approx(metrics[name], rel=CLOSE, abs=4 * CLOSE), name


def with_kl(roles: Roles, sign: int) -> list[LabelledSequence]:
    """`LABELLED` with mismatched answers that the policy has come to like more, or less, than the reference does."""
    candidates = [text(3 + seed % 4, 70 + seed) for seed in range(24)]
    batch = pack(candidates)
    with torch.no_grad():
        ratios = sequence_logps(roles, batch) - reference_logps(roles, batch)
    best = (sign * ratios).argsort(descending=True).tolist()
    assert all(sign * ratios[place] > 0.01 for place in best[:5])
    return [replace(one, mismatched=candidates[place]) for one, place in zip(LABELLED, best, strict=False)]


@pytest.mark.parametrize("kl", ["positive", "negative", "none"])
@pytest.mark.parametrize("kind", ["mixed", "desirable", "undesirable"])
def test_labelled_answers(roles, models, kl, kind):
    """kto with an estimate that counts and one that is clamped at 0; apo_zero_unpaired, which has none."""
    from trl import KTOTrainer

    policy, reference = models
    loss_type = "apo_zero_unpaired" if kl == "none" else "kto"
    examples = with_kl(roles, -1 if kl == "negative" else 1)
    if kind != "mixed":
        examples = [one for one in examples if one.desirable == (kind == "desirable")]
    # as the command's tokenizer leaves them
    stripped = [replace(one, mismatched=TokenSequence((), ())) for one in examples]
    config = DPOConfig(use_peft=False, loss_type=[loss_type], beta=0.25, desirable_weight=1.5, undesirable_weight=0.75)
    theirs = trainer(
        KTOTrainer,
        policy,
        reference,
        beta=config.beta,
        calculate_KL=loss_type == "kto",
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        loss_type=loss_type,
        precompute_ref_logps=False,
    )
    inputs: dict[str, Tensor] = padded([one.sequence for one in examples])
    inputs |= {f"KL_{name}": value for name, value in padded([one.mismatched for one in examples]).items()}
    inputs["label"] = torch.tensor([one.desirable for one in examples])
    their_loss = theirs._compute_loss(policy, inputs, False)
    mine = ours(roles, config, examples if loss_type == "kto" else stripped)
    assert_equal(roles, mine, policy, their_loss)
    row = divide_sums_by_counts(sum_metrics([mine]))
    logged = {name: values[0] for name, values in theirs._metrics["train"].items() if values}
    assert set(row) == {"loss"} | {name for name in logged if name.startswith(("rewards/", "logps/", "kl"))}
    for name, value in row.items():
        if name != "loss":
            assert value == pytest.approx(logged[name], rel=CLOSE, abs=4 * CLOSE), name
    assert (row["kl"] > 0.01) == (kl == "positive")


def test_packs_are_what_the_comparison_used():
    """Packed on our side: nothing is padded, and the mismatched answers come last."""
    assert pack_pairs(LEVEL).sequences.lengths == (7, 7, 7, 7, 4, 6, 8, 10)
    assert pack_labelled(LABELLED).sequences.lengths == (5, 6, 7, 8, 9, 6, 7, 8, 9, 5)
