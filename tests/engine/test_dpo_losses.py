"""Every preference loss that `onecard dpo` offers runs; what cannot work is one line, before anything is loaded."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from onecard.algorithms import dpo
from onecard.batches import PreferencePair, TokenSequence, pack_pairs
from onecard.config import DPOConfig
from onecard.errors import OnecardError
from onecard.metrics import add_up
from onecard.models.build import load_roles
from onecard_kernels import Loss
from onecard_kernels.dpo.losses import LOSSES, WHOLE_BATCH


def text(length: int, seed: int) -> TokenSequence:
    response = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenSequence((5, 6, *response), (False, False, *[True] * length))


PAIRS = [PreferencePair(text(3 + i, i), text(6 - i, 10 + i)) for i in range(4)]


def test_the_flag_s_help_names_every_loss() -> None:
    help_text = next(field.metadata["help"] for field in fields(DPOConfig) if field.name == "loss_type")
    words = help_text.split(";")[0].replace(",", " ").replace(" or ", " ").split()
    assert sorted(words) == sorted(LOSSES)


@pytest.fixture(scope="module")
def roles(tiny_model):
    loaded = load_roles(DPOConfig(model=str(tiny_model)), trained="policy", reference=True)
    with torch.no_grad():  # away from the reference, where all pairs are alike
        for parameter in loaded.trained_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return loaded


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_goes_through_the_engine(roles, loss_type):
    """In two micro-batches it is the whole batch's, or for what sorts a batch the mean of two batches'."""
    config = DPOConfig(loss_type=[loss_type], label_smoothing=0.1)
    keywords = dpo.loss_keywords(config)
    whole = dpo.preference_loss(roles, pack_pairs(PAIRS), keywords, 4)
    assert whole.loss.requires_grad
    cut = [dpo.preference_loss(roles, pack_pairs(part), keywords, 4) for part in (PAIRS[:1], PAIRS[1:])]
    parts = add_up([Loss(part.loss.detach(), part.metrics) for part in cut])
    expected = {"loss": whole.loss.item(), **{name: value.item() for name, value in whole.metrics.items()}}
    if loss_type in WHOLE_BATCH:
        alone = [dpo.preference_loss(roles, pack_pairs(part), keywords, len(part)) for part in (PAIRS[:1], PAIRS[1:])]
        expected["loss"] = (alone[0].loss.item() + 3 * alone[1].loss.item()) / 4
    assert parts == pytest.approx(expected, rel=1e-5, abs=1e-6)


BAD = {
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
        dpo.loss_keywords(DPOConfig(**settings))
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
