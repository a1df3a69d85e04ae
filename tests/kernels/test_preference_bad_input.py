"""The preference losses refuse bad input with the argument's name, what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onecard_kernels import dpo_loss, linear_dpo_loss
from onecard_kernels.dpo import cpo_loss, kto_loss, linear, orpo_loss, simpo_loss
from onecard_kernels.dpo.losses import ANY_DIVERGENCE, LOSSES

N, D, V = 4, 8, 31
NAN, INF = float("nan"), float("inf")


def filled(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.float32)


def meta(*shape: int) -> torch.Tensor:
    """A tensor of another device, wherever the tests run."""
    return torch.zeros(shape, device="meta")


SUMS = {"chosen_logps": filled(-1, N), "rejected_logps": filled(-2, N)}
LENGTHS = {"chosen_lengths": torch.ones(N), "rejected_lengths": torch.ones(N)}

GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    dpo_loss: {**SUMS, "ref_chosen_logps": filled(-1, N), "ref_rejected_logps": filled(-1, N)},
    linear_dpo_loss: {
        "hidden": filled(1, N, D),
        "weight": filled(1, V, D),
        "targets": torch.arange(N),
        "sequence_ids": torch.tensor([0, 0, 1, -1]),
        "ref_logps": filled(-1, 2),
    },
    simpo_loss: {**SUMS, **LENGTHS},
    orpo_loss: {**SUMS, **LENGTHS},
    cpo_loss: SUMS,
    kto_loss: {
        "logps": filled(-1, N),
        "ref_logps": filled(-2, N),
        "desirable": torch.ones(N).bool(),
        "kl": torch.tensor(0.0),
    },
}

Case = tuple[Callable[..., Any], dict[str, Any], type[Exception], tuple[str, ...]]

# function, what is wrong, error, words of its message: the argument first, then what came, then what was expected
BAD: list[Case] = [
    *(
        (function, wrong, kind, words)
        for function in (dpo_loss, linear_dpo_loss)
        for wrong, kind, words in (
            ({"loss_type": 3}, TypeError, ("loss_type", "3", "a name or several")),
            ({"loss_weights": 1.0}, TypeError, ("loss_weights", "1.0", "several numbers")),
            ({"loss_type": "exo_pair"}, ValueError, ("label_smoothing", "0.0", "above 0", "'exo_pair'")),
            ({"loss_type": ["sft", "exo_pair"]}, ValueError, ("label_smoothing", "0.0", "above 0", "'exo_pair'")),
            ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, ("label_smoothing", "0.5", "below 0.5")),
            ({"loss_type": "aot", "normalizer": 8}, ValueError, ("normalizer", "8", "None", "'aot'", "whole batch")),
            (
                {"loss_type": ["sigmoid", "aot_unpaired"], "normalizer": torch.tensor(8.0)},
                ValueError,
                ("normalizer", "8.", "None", "'aot_unpaired'", "whole batch"),
            ),
            ({"loss_type": "aot", "weights": filled(1, N)}, ValueError, ("weights", "Tensor", "None", "'aot'")),
            (
                {"loss_type": "aot_unpaired", "weights": filled(1, N)},
                ValueError,
                ("weights", "Tensor", "None", "'aot_unpaired'"),
            ),
            ({"weights": filled(1, N + 1)}, ValueError, ("weights", "(5,)")),
            ({"normalizer": -1}, ValueError, ("normalizer", "-1", "above 0")),
            ({"chosen_lengths": torch.ones(N)}, ValueError, ("rejected_lengths",)),
            *(
                (
                    {"loss_type": name, "f_divergence_type": "js_divergence"},
                    ValueError,
                    ("f_divergence_type", "'js_divergence'", "'reverse_kl'", repr(name)),
                )
                for name in LOSSES
                if name not in ANY_DIVERGENCE
            ),
        )
        if not (function is linear_dpo_loss and "chosen_lengths" in wrong)
    ),
    (dpo_loss, {"chosen_lengths": [1.0], "rejected_lengths": [1.0]}, TypeError, ("chosen_lengths", "list", "tensor")),
    (dpo_loss, {**LENGTHS, "rejected_lengths": filled(NAN, N)}, ValueError, ("rejected_lengths", "4 NaN", "none")),
    (dpo_loss, {**LENGTHS, "rejected_lengths": meta(N)}, ValueError, ("rejected_lengths", "meta", "cpu")),
    (linear_dpo_loss, {"chosen_lengths": torch.ones(1)}, ValueError, ("rejected_lengths", "None", "both")),
    (linear_dpo_loss, LENGTHS, ValueError, ("chosen_lengths", "(4,)", "(1,)")),
    *(
        (function, wrong, kind, words)
        for function in (simpo_loss, orpo_loss, cpo_loss)
        for wrong, kind, words in (
            ({"chosen_logps": filled(-1, N, 1)}, ValueError, ("chosen_logps", "(4, 1)", "[B]")),
            ({"chosen_logps": torch.ones(N).int()}, TypeError, ("chosen_logps", "int32", "floating")),
            ({"rejected_logps": filled(-1, 1)}, ValueError, ("rejected_logps", "(1,)", "(4,)")),
            ({"rejected_logps": filled(NAN, N)}, ValueError, ("rejected_logps", "4 NaN", "none")),
            ({"rejected_logps": meta(N)}, ValueError, ("rejected_logps", "meta", "cpu")),
            ({**LENGTHS, "chosen_lengths": torch.ones(1)}, ValueError, ("chosen_lengths", "(1,)", "(4,)")),
            ({"beta": 0.0}, ValueError, ("beta", "0.0", "above 0")),
            ({"weights": filled(1, 1)}, ValueError, ("weights", "(1,)", "(4,)")),
            ({"weights": filled(NAN, N)}, ValueError, ("weights", "4 NaN", "none")),
            ({"normalizer": 0}, ValueError, ("normalizer", "0", "above 0")),
        )
    ),
    (simpo_loss, {"rejected_lengths": None}, ValueError, ("rejected_lengths", "None", "tensor")),
    (orpo_loss, {"chosen_lengths": None}, ValueError, ("chosen_lengths", "None", "tensor")),
    (simpo_loss, {"gamma": -0.1}, ValueError, ("gamma", "-0.1", "0 or more")),
    (simpo_loss, {"label_smoothing": 0.6}, ValueError, ("label_smoothing", "0.6", "0 to 0.5")),
    (cpo_loss, {"chosen_lengths": torch.ones(N)}, ValueError, ("rejected_lengths", "None", "both")),
    (cpo_loss, {"loss_type": "simpo"}, ValueError, ("loss_type", "'simpo'", "'sigmoid', 'hinge', 'ipo'")),
    (cpo_loss, {"loss_type": ["sigmoid"]}, ValueError, ("loss_type", "['sigmoid']", "'sigmoid', 'hinge', 'ipo'")),
    (cpo_loss, {"cpo_alpha": -1.0}, ValueError, ("cpo_alpha", "-1.0", "0 or more")),
    (cpo_loss, {"label_smoothing": 0.6}, ValueError, ("label_smoothing", "0.6", "0 to 0.5")),
    (kto_loss, {"logps": filled(-1, N, 1)}, ValueError, ("logps", "(4, 1)", "[B]", "response")),
    (kto_loss, {"ref_logps": filled(-1, 1)}, ValueError, ("ref_logps", "(1,)", "(4,)")),
    (kto_loss, {"ref_logps": filled(NAN, N)}, ValueError, ("ref_logps", "4 NaN", "none")),
    (kto_loss, {"desirable": torch.ones(N)}, TypeError, ("desirable", "float32", "torch.bool")),
    (kto_loss, {"desirable": torch.ones(1).bool()}, ValueError, ("desirable", "(1,)", "(4,)")),
    (kto_loss, {"desirable": meta(N).bool()}, ValueError, ("desirable", "meta", "cpu")),
    (kto_loss, {"kl": 0.5}, TypeError, ("kl", "float", "tensor")),
    (kto_loss, {"kl": filled(0, N)}, ValueError, ("kl", "(4,)", "()")),
    (kto_loss, {"kl": torch.tensor(INF)}, ValueError, ("kl", "inf", "finite")),
    (kto_loss, {"kl": meta()}, ValueError, ("kl", "meta", "cpu")),
    (kto_loss, {"beta": -1.0}, ValueError, ("beta", "-1.0", "above 0")),
    (kto_loss, {"desirable_weight": -1.0}, ValueError, ("desirable_weight", "-1.0", "0 or more")),
    (kto_loss, {"undesirable_weight": INF}, ValueError, ("undesirable_weight", "inf", "finite")),
    (kto_loss, {"weights": filled(1, 1)}, ValueError, ("weights", "(1,)", "(4,)")),
    (kto_loss, {"normalizer": filled(1, N)}, ValueError, ("normalizer", "(4,)", "()")),
]


@pytest.mark.parametrize("function", GOOD)
def test_the_good_input_is_good(function: Callable[..., Any]) -> None:
    assert function(**GOOD[function]).loss.isfinite()


@pytest.mark.parametrize("case", range(len(BAD)))
def test_refuses(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    function, wrong, kind, words = BAD[case]
    monkeypatch.setattr(linear, "linear_logprobs", lambda *_, **__: pytest.fail("worked before it looked"))
    with pytest.raises(kind) as caught:
        function(**{**GOOD[function], **wrong})
    message = str(caught.value)
    assert message.startswith(f"{words[0]} "), message
    assert "\n" not in message
    place = 0
    for word in words:
        found = re.compile(re.escape(word)).search(message, place)
        assert found, f"{word!r} not in {message!r} after {message[:place]!r}"
        place = found.end()
