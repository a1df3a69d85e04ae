"""dpo_loss equals TRL's `DPOTrainer._compute_loss` itself, in value, gradient and metrics."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard_kernels import dpo_loss, sequence_sums
from onecard_kernels.dpo.losses import ANY_DIVERGENCE, LOSSES

trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="compares with TRL's own code")

METRICS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
B, T = 5, 9


def trl_loss(
    logps: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, sum_sq: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, dict]:
    """TRL's own method, on a stand-in trainer and a model that answers with `logps`."""

    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    metrics: Any = defaultdict(lambda: defaultdict(list))
    zeros = torch.zeros(2 * B, T)
    output = SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=sum_sq
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=sum_sq is not None,
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        loss_types=options["loss_type"],
        loss_weights=options["loss_weights"],
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    # Position 0 is the prompt: TRL shifts the mask by one inside.
    full_mask = torch.cat([torch.zeros(2 * B, 1, dtype=mask.dtype), mask], dim=1)
    inputs = {
        "input_ids": torch.zeros_like(full_mask),
        "attention_mask": torch.ones_like(full_mask),
        "completion_mask": full_mask,
        "ref_chosen_logps": ref[:B],
        "ref_rejected_logps": ref[B:],
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    return loss, {name: metrics["train"][name][0] for name in METRICS}


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps of 1/64: sums and differences of these are exact in fp32 too."""
    lengths = torch.tensor([1, 9, 4, 7, 3, 9, 2, 5, 8, 6])
    mask = (torch.arange(T) < lengths.unsqueeze(1)).long()
    logps = -(torch.rand(2 * B, T) * 192).round() / 64 * mask
    ref = logps.sum(1) + (torch.randn(2 * B) * 45).round() / 64
    return logps.to(dtype).requires_grad_(), ref.to(dtype), mask


# TRL's sigmoid and sigmoid_norm ignore label_smoothing.
SMOOTHING = {"robust": 0.125, "exo_pair": 0.25, "aot": 0.125, "aot_unpaired": 0.125}
# Types, their factors, label smoothing.
CASES: list[tuple[list[str], list[float], float]] = [
    *(([name], [0.75], SMOOTHING.get(name, 0.0)) for name in LOSSES),
    (["robust"], [1.0], 0.0),
    (["aot"], [1.0], 0.0),
    (["sigmoid", "ipo", "hinge"], [1.0, 0.25, 0.5], 0.0),
    (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], 0.0),
]
DIVERGENCES = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("js_divergence", 0.5),
    ("alpha_divergence", 0.5),
    ("alpha_divergence", 1.0),
    ("alpha_divergence", 2.0),
]
DEFINED = [
    (*case, *kind) for case in CASES for kind in DIVERGENCES if kind[0] == "reverse_kl" or {*case[0]} <= ANY_DIVERGENCE
]


def tolerance(loss_types: list[str], alpha_divergence: bool) -> float:
    """fp64 but for two places of TRL's that are fp32: exo_pair's epsilon, and alpha_divergence, all of it."""
    if not alpha_divergence:
        # log(epsilon) and log(1 - epsilon), half an ulp of fp32 each at up to 1.4
        return 1e-12 if "exo_pair" not in loss_types else 2 * 1.4 * torch.finfo(torch.float32).eps
    # e^x - 1 loses an ulp of e^x, up to e^2 here; discopop_tau = 1/16 divides, and ipo squares, what is left of it.
    return 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("loss_type", "loss_weights", "smoothing", "f_divergence_type", "alpha"), DEFINED)
def test_value_gradient_and_metrics_equal_trl_s(
    loss_type: list[str], loss_weights: list[float], smoothing: float, f_divergence_type: str, alpha: float
) -> None:
    with_alpha = f_divergence_type == "alpha_divergence"
    logps, ref, mask = batch(torch.float32 if with_alpha else torch.float64)
    options: dict[str, Any] = {
        "beta": 0.25,
        "loss_type": loss_type,
        "loss_weights": loss_weights,
        "label_smoothing": smoothing,
        "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": alpha,
        "discopop_tau": 0.0625,
    }
    theirs, their_metrics = trl_loss(logps, ref, mask, **options)
    their_grad = torch.autograd.grad(theirs, logps)[0] * mask  # a model gives no gradient elsewhere
    lengths = mask.sum(1).double()
    if "sft" in loss_type:  # TRL's is a mean over all chosen tokens: ours with the mean of the lengths for each
        assert not {"ipo", "sigmoid_norm"} & {*loss_type}
        lengths[:B] = lengths[:B].mean()
    sums = (logps * mask).sum(1)
    mine = dpo_loss(
        sums[:B], sums[B:], ref[:B], ref[B:], chosen_lengths=lengths[:B], rejected_lengths=lengths[B:], **options
    )
    my_grad = torch.autograd.grad(mine.loss, logps)[0]
    off = tolerance(loss_type, with_alpha)
    assert mine.loss.dtype == logps.dtype
    torch.testing.assert_close(mine.loss, theirs, rtol=off, atol=off)
    torch.testing.assert_close(my_grad, their_grad, rtol=off, atol=off)
    assert my_grad.abs().max() > 1e-3
    assert set(mine.metrics) == set(METRICS)
    for name, value in mine.metrics.items():
        assert value.item() == pytest.approx(their_metrics[name], rel=1e-6)  # TRL's accuracies are fp32


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo", "nca_pair"]])
def test_wpo_is_a_choice_of_weights(loss_type: list[str]) -> None:
    """As dpo_loss's docstring says it: `use_weighting` of TRL, from what linear_logprobs returns."""
    logps, ref, mask = batch(torch.float64)
    sum_sq = -torch.rand(2 * B, T, dtype=torch.float64)
    options: dict[str, Any] = {"beta": 0.25, "loss_type": loss_type, "loss_weights": [1.0, 0.5][: len(loss_type)]}
    theirs, _ = trl_loss(logps, ref, mask, sum_sq, **options)

    ids = torch.where(mask.bool(), torch.arange(2 * B).unsqueeze(1), -1)
    lengths = mask.sum(1)
    sums = sequence_sums(logps, ids, 2 * B)
    m = sequence_sums((logps - sum_sq).detach(), ids, 2 * B) / lengths
    weights = (m[:B] + m[B:]).exp()
    mine = dpo_loss(
        *(sums[:B], sums[B:], ref[:B], ref[B:]),
        chosen_lengths=lengths[:B],
        rejected_lengths=lengths[B:],
        weights=weights,
        **options,
    )
    torch.testing.assert_close(mine.loss, theirs, rtol=1e-12, atol=0)
    mine_grad, their_grad = (torch.autograd.grad(x, logps)[0] * mask for x in (mine.loss, theirs))
    torch.testing.assert_close(mine_grad, their_grad, rtol=1e-12, atol=1e-15)
