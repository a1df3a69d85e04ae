"""dpo_loss against TRL's own code, against hand-worked constants, and against itself in micro-batches."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard_kernels import dpo_loss

LOSSES = ["sigmoid", "ipo", "hinge", "discopop"]
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
METRICS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
B, T = 5, 9


def trl_loss(logps: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict]:
    """TRL's `DPOTrainer._compute_loss` itself, on a stand-in trainer and a model that answers with `logps`."""
    trainer_module = pytest.importorskip("trl.trainer.dpo_trainer", reason="compares with TRL's own code")

    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    metrics: Any = defaultdict(lambda: defaultdict(list))
    zeros = torch.zeros(2 * B, T)
    output = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        loss_types=options["loss_type"],
        loss_weights=options["loss_weights"],
        f_divergence_type=options["f_divergence_type"],
        f_alpha_divergence_coef=options["f_alpha_divergence_coef"],
        args=SimpleNamespace(discopop_tau=options["discopop_tau"]),
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
    loss = trainer_module.DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    return loss, {name: metrics["train"][name][0] for name in METRICS}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([1, 9, 4, 7, 3, 9, 2, 5, 8, 6])
    mask = (torch.arange(T) < lengths.unsqueeze(1)).long()
    logps = -torch.rand(2 * B, T) * 3 * mask
    return logps.requires_grad_(), logps.detach().sum(1) + torch.randn(2 * B) * 0.7, mask


@pytest.mark.parametrize("f_divergence_type", DIVERGENCES)
@pytest.mark.parametrize("loss_type", [[name] for name in LOSSES] + [["sigmoid", "ipo", "hinge"]])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_value_gradient_and_metrics_equal_trl_s(loss_type: list[str], f_divergence_type: str, alpha: float) -> None:
    logps, ref, mask = batch()
    options: dict[str, Any] = {
        "beta": 0.3,
        "loss_type": loss_type,
        "loss_weights": [1.0, 0.25, 0.5][: len(loss_type)],
        "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": alpha,
        "discopop_tau": 0.07,
    }
    theirs, their_metrics = trl_loss(logps, ref, mask, **options)
    their_grad = torch.autograd.grad(theirs, logps)[0]
    lengths = mask.sum(1)
    sums = logps.sum(1)
    mine = dpo_loss(
        sums[:B], sums[B:], ref[:B], ref[B:], chosen_lengths=lengths[:B], rejected_lengths=lengths[B:], **options
    )
    my_grad = torch.autograd.grad(mine.loss, logps)[0]
    torch.testing.assert_close(mine.loss, theirs, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(my_grad, their_grad, rtol=2e-5, atol=1e-6)
    assert set(mine.metrics) == set(METRICS)
    for name, value in mine.metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.item() == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-6)


def one_pair(chosen: float, rejected: float) -> tuple[torch.Tensor, ...]:
    """Log-ratios as given, with references that are not zero."""
    return tuple(torch.tensor([x], dtype=torch.float64) for x in (chosen - 3.0, rejected - 4.0, -3.0, -4.0))


# beta = 0.5, log-ratios 1 and -1: delta = 2, beta delta = 1.
CONSTANTS = [
    ({"loss_type": "sigmoid"}, math.log1p(math.exp(-1))),
    ({"loss_type": "sigmoid", "label_smoothing": 0.2}, math.log1p(math.exp(-1)) + 0.2 * 1.0),  # the halves differ by 1
    ({"loss_type": "hinge"}, 0.0),
    ({"loss_type": "hinge", "beta": 0.25}, 0.5),
    ({"loss_type": "ipo"}, 1.0),  # (2 - 1)^2
    ({"loss_type": "ipo", "lengths": (2, 4)}, (0.5 + 0.25 - 1.0) ** 2),
    ({"loss_type": "ipo", "lengths": (0, 0)}, 1.0),  # an empty response counts as one token
    ({"loss_type": "sigmoid", "lengths": (2, 4)}, math.log1p(math.exp(-1))),  # only ipo looks at lengths
    ({"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}, math.log1p(math.exp(-0.5 * (math.e - 1 / math.e)))),
    # js: logsigmoid(1) - logsigmoid(-1) = 1
    ({"loss_type": "hinge", "f_divergence_type": "js_divergence"}, 0.5),
    # alpha 1/2: -2 (e^-1/2 - e^1/2) = 4 sinh(1/2)
    ({"loss_type": "ipo", "f_divergence_type": "alpha_divergence"}, (4 * math.sinh(0.5) - 1) ** 2),
    ({"loss_type": ["hinge", "ipo"], "loss_weights": [2.0, 3.0], "beta": 0.25}, 2 * 0.5 + 3 * 0.0),
    ({"loss_type": "discopop", "discopop_tau": 1e-3}, math.exp(-1)),  # the mixture is all exponential
]


@pytest.mark.parametrize(("options", "expected"), CONSTANTS)
def test_constants(options: dict[str, Any], expected: float) -> None:
    options = {"beta": 0.5, **options}
    lengths = options.pop("lengths", None)
    if lengths:
        options["chosen_lengths"], options["rejected_lengths"] = (torch.tensor([n]) for n in lengths)
    got = dpo_loss(*one_pair(1.0, -1.0), **options)
    assert got.loss.dtype == torch.float64
    assert got.loss.item() == pytest.approx(expected, abs=1e-12)
    assert got.metrics["rewards/chosen"].item() == pytest.approx(options["beta"])
    assert got.metrics["rewards/margins"].item() == pytest.approx(2 * options["beta"])
    assert got.metrics["rewards/accuracies"].item() == 1.0


def test_label_smoothing_is_the_expected_loss_under_flipped_pairs() -> None:
    a, b, ra, rb = (torch.randn(6, dtype=torch.float64) for _ in range(4))
    smooth = dpo_loss(a, b, ra, rb, label_smoothing=0.3).loss
    straight, flipped = dpo_loss(a, b, ra, rb).loss, dpo_loss(b, a, rb, ra).loss
    assert torch.allclose(smooth, 0.7 * straight + 0.3 * flipped)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_add_up(loss_type: str) -> None:
    """With one `normalizer`, in loss, gradient and every metric; without it each would average by itself."""
    leaves = [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    weights, lengths = torch.rand(7, dtype=torch.float64), torch.arange(1, 8)

    def part(piece: slice, **kw: Any) -> Any:
        lens = {"chosen_lengths": lengths[piece], "rejected_lengths": lengths.flip(0)[piece]}
        return dpo_loss(*(x[piece] for x in leaves), loss_type=loss_type, weights=weights[piece], **lens, **kw)

    whole = part(slice(None))
    parts = [part(slice(a, b), normalizer=n) for a, b, n in ((0, 3, 7), (3, 4, torch.tensor(7.0)), (4, 7, 7.0))]
    assert torch.allclose(whole.loss, sum(p.loss for p in parts))
    for name, value in whole.metrics.items():
        assert torch.allclose(value, sum(p.metrics[name] for p in parts))
    for a, b in zip(
        torch.autograd.grad(whole.loss, leaves), torch.autograd.grad(sum(p.loss for p in parts), leaves), strict=True
    ):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("f_divergence_type", DIVERGENCES)
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("ratio", [(200.0, -200.0), (-200.0, 200.0), (-200.0, -200.0)])
def test_log_ratios_of_200_stay_finite(loss_type: str, f_divergence_type: str, ratio: tuple[float, float]) -> None:
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in ratio)
    out = dpo_loss(
        chosen, rejected, torch.zeros(1), torch.zeros(1), loss_type=loss_type, f_divergence_type=f_divergence_type
    )
    if not (loss_type == "ipo" and f_divergence_type in ("forward_kl", "alpha_divergence")):  # a square of e^80
        assert out.loss.isfinite()
    grads = torch.autograd.grad(out.loss, (chosen, rejected))
    assert all(not g.isnan().any() for g in grads)


@pytest.mark.parametrize("f_divergence_type", DIVERGENCES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradcheck(loss_type: str, f_divergence_type: str) -> None:
    leaves = tuple(torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4))

    def loss(*x: torch.Tensor) -> torch.Tensor:
        return dpo_loss(*x, loss_type=loss_type, f_divergence_type=f_divergence_type, label_smoothing=0.1).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_low_precision_and_no_pairs() -> None:
    low = [torch.randn(3).bfloat16() for _ in range(4)]
    for normalizer in (None, 3, torch.tensor(3.0, dtype=torch.float64)):
        got = dpo_loss(*low, normalizer=normalizer)
        assert {x.dtype for x in (got.loss, *got.metrics.values())} == {torch.float32}
    none = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    out = dpo_loss(*none)
    out.loss.backward()
    assert out.loss.item() == 0.0
