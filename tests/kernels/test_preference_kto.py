"""kto_loss: by hand, against TRL's own code, in parts, and far out."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard_kernels import Loss
from onecard_kernels.dpo import kto_loss

INF = float("inf")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def material(count: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logps = (-torch.rand(count, dtype=torch.float64) * 9).requires_grad_()
    ref = logps.detach() + torch.randn(count, dtype=torch.float64)
    return logps, ref, torch.arange(count) % 3 != 1, torch.tensor(0.6, dtype=torch.float64)


def test_by_hand() -> None:
    """Log-ratios 2 (desirable) and 3 (undesirable), z = 1, beta = 1/2, weights 4 and 3."""
    logps, ref = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-3.0, -5.0]).double()
    weights = {"desirable_weight": 4.0, "undesirable_weight": 3.0}
    labels = torch.tensor([True, False])
    got = kto_loss(logps, ref, labels, torch.tensor(1.0), beta=0.5, **weights)
    assert got.loss.item() == pytest.approx((4 * sigmoid(-0.5) + 3 * sigmoid(1.0)) / 2, abs=1e-12)
    assert {name: value.item() for name, value in got.metrics.items()} == {
        "rewards/chosen_sum": 0.5,
        "rewards/rejected_sum": 0.75,
        "count/chosen": 0.5,
        "count/rejected": 0.5,
        "kl": 1.0,
    }
    below = kto_loss(logps, ref, labels, torch.tensor(-3.0), beta=0.5)  # an estimate below 0 counts as 0
    assert below.loss.item() == pytest.approx((sigmoid(-1.0) + sigmoid(1.5)) / 2, abs=1e-12)
    assert below.metrics["kl"].item() == 0.0


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl_shift", [0.5, -0.5])
@pytest.mark.parametrize("labels", ["mixed", "desirable", "undesirable"])
def test_value_gradient_and_metrics_equal_trl_s(loss_type: str, kl_shift: float, labels: str) -> None:
    """`KTOTrainer._compute_loss` itself, on a stand-in trainer and a model that answers with `logps`."""
    trainer_module = pytest.importorskip("trl.trainer.kto_trainer", reason="compares with TRL's own code")
    logps, ref, desirable, _ = material()
    desirable = {"mixed": desirable, "desirable": desirable | True, "undesirable": desirable & False}[labels]
    kl_logps, ref_kl_logps = torch.randn(7).double(), torch.randn(7).double()
    kl_logps += kl_shift - (kl_logps - ref_kl_logps).mean()
    metrics: Any = defaultdict(lambda: defaultdict(list))
    zeros = torch.zeros(7, 1)
    output = SimpleNamespace(log_probs=logps.unsqueeze(1), entropy=zeros, mean_logits=zeros)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        beta=0.25,
        calculate_KL=loss_type == "kto",
        desirable_weight=1.5,
        loss_type=loss_type,
        precompute_ref_logps=True,
        undesirable_weight=0.75,
        _compute_kl_logps=lambda *_: kl_logps,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    ones = torch.ones(7, 2, dtype=torch.long)
    inputs = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": torch.tensor([[0, 1]]).expand(7, 2),
        "label": desirable,
        "ref_logps": ref,
        "ref_KL_logps": ref_kl_logps,
    }
    theirs = trainer_module.KTOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    kl = (kl_logps - ref_kl_logps).mean() if loss_type == "kto" else torch.tensor(0.0)
    mine = kto_loss(logps, ref, desirable, kl, beta=0.25, desirable_weight=1.5, undesirable_weight=0.75)
    torch.testing.assert_close(mine.loss, theirs, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(x, logps)[0] for x in (mine.loss, theirs))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    logged = {name: values[0] for name, values in metrics["train"].items() if values}
    assert mine.metrics["kl"].item() == pytest.approx(logged["kl"])
    for side in ("chosen", "rejected"):
        assert (f"rewards/{side}" in logged) == bool(mine.metrics[f"count/{side}"])
        if f"rewards/{side}" in logged:
            mean = mine.metrics[f"rewards/{side}_sum"] / mine.metrics[f"count/{side}"]
            assert mean.item() == pytest.approx(logged[f"rewards/{side}"])


def test_micro_batches_add_up() -> None:
    logps, ref, desirable, kl = material()
    weights = torch.rand(7, dtype=torch.float64)

    def part(piece: slice, **kw: Any) -> Loss:
        pieces = (x[piece] for x in (logps, ref, desirable))
        return kto_loss(*pieces, kl, weights=weights[piece], undesirable_weight=2.0, **kw)

    whole = part(slice(None))
    parts = [part(slice(a, b), normalizer=n) for a, b, n in ((0, 3, 7), (3, 4, torch.tensor(7.0)), (4, 7, 7.0))]
    total = sum(p.loss for p in parts)
    assert torch.allclose(whole.loss, total)
    assert torch.allclose(torch.autograd.grad(whole.loss, logps)[0], torch.autograd.grad(total, logps)[0])
    for name, value in whole.metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        assert torch.allclose(value, sum(p.metrics[name] for p in parts)), name
    assert not torch.allclose(whole.loss, kto_loss(logps, ref, desirable, kl, undesirable_weight=2.0).loss)


def test_gradcheck_and_no_gradient_for_reference_and_estimate() -> None:
    logps, ref, desirable, kl = material()
    assert torch.autograd.gradcheck(lambda a: kto_loss(a, ref, desirable, kl).loss, (logps,))
    constants = ref.requires_grad_(), kl.requires_grad_()
    loss = kto_loss(logps, ref, desirable, kl).loss
    assert torch.autograd.grad(loss, constants, allow_unused=True) == (None, None)


def test_far_and_infinite_log_probabilities() -> None:
    far = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    labels = torch.tensor([True, True, False, False])
    for beta in (0.1, 10.0):
        out = kto_loss(far, torch.zeros(4), labels, torch.tensor(0.0), beta=beta)
        assert out.loss.item() == pytest.approx(0.5, abs=1e-8)  # the wrong ones cost 1 each, and no more
        assert torch.autograd.grad(out.loss, far)[0].isfinite().all()
    small = kto_loss(
        far, torch.zeros(4), labels, torch.tensor(0.0), beta=0.2, weights=torch.tensor([1.0, 0, 0, 0])
    ).loss
    assert small.item() == pytest.approx(math.exp(-40) / 4, rel=1e-5, abs=0)  # 1 - sigmoid(40) would be 0
    lost = torch.full((2,), -INF, requires_grad=True)
    out = kto_loss(lost, lost.detach(), labels[1:3], torch.tensor(1.0), beta=1.0)
    assert out.loss.item() == pytest.approx((sigmoid(1.0) + sigmoid(-1.0)) / 2)
    assert torch.equal(torch.autograd.grad(out.loss, lost)[0], torch.zeros(2))


def test_low_precision_and_no_responses() -> None:
    logps, ref, desirable, kl = material()
    low = kto_loss(logps.bfloat16(), ref.bfloat16(), desirable, kl, weights=torch.ones(7).double())
    assert {x.dtype for x in (low.loss, *low.metrics.values())} == {torch.float32}
    empty = torch.zeros(0, requires_grad=True)
    out = kto_loss(empty, empty, torch.zeros(0).bool(), kl)
    out.loss.backward()
    assert out.loss.item() == 0.0
