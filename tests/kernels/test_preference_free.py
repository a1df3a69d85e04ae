"""simpo_loss, orpo_loss and cpo_loss: constants, identities, TRL's and Liger's own code, far log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch

from onecard_kernels import Loss, dpo_loss
from onecard_kernels.dpo import cpo_loss, orpo_loss, simpo_loss

INF = float("inf")
REWARDS = {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")}


def cpo(chosen: torch.Tensor, rejected: torch.Tensor, n: torch.Tensor, m: torch.Tensor, **kw: Any) -> Loss:
    return cpo_loss(chosen, rejected, chosen_lengths=n, rejected_lengths=m, **kw)


# Each in one signature: two sums, two lengths, keywords.
FREE: dict[str, tuple[Callable[..., Loss], dict[str, Any]]] = {
    "simpo": (simpo_loss, {"beta": 2.0, "gamma": 0.5}),
    "simpo smoothed": (simpo_loss, {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2}),
    "orpo": (orpo_loss, {"beta": 0.3}),
    "cpo": (cpo, {"beta": 0.3}),
    "cpo smoothed": (cpo, {"beta": 0.3, "label_smoothing": 0.2}),
    "cpo hinge": (cpo, {"beta": 0.3, "loss_type": "hinge", "cpo_alpha": 0.5}),
    "cpo ipo": (cpo, {"beta": 0.3, "loss_type": "ipo", "cpo_alpha": 0.0}),
}


def material(count: int = 4, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    chosen, rejected = (-torch.rand(count, dtype=dtype) * 6 - 0.5 for _ in range(2))
    return chosen.requires_grad_(), rejected.requires_grad_(), torch.arange(1, count + 1), torch.full((count,), 3)


def one(function: Callable[..., Loss], chosen: float, rejected: float, *lengths: int, **kw: Any) -> Loss:
    sums = (torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected))
    return function(*sums, *(torch.tensor([n]) for n in lengths), **kw)


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


def test_simpo_by_hand() -> None:
    """Means -1/2 and -3/2, beta 2: rewards -1 and -3, margin 2, of which gamma takes 1/2."""
    got = one(simpo_loss, -1.0, -6.0, 2, 4, beta=2.0, gamma=0.5)
    assert got.loss.item() == pytest.approx(log1pexp(-1.5), abs=1e-12)
    smooth = one(simpo_loss, -1.0, -6.0, 2, 4, beta=2.0, gamma=0.5, label_smoothing=0.2)
    assert smooth.loss.item() == pytest.approx(log1pexp(-1.5) + 0.2 * 1.5, abs=1e-12)
    assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(
        {"rewards/chosen": -1, "rewards/rejected": -3, "rewards/margins": 2, "rewards/accuracies": 1}
    )
    assert one(simpo_loss, -1.0, -6.0, 0, 4).loss == one(simpo_loss, -1.0, -6.0, 1, 4).loss  # empty: one token


def test_orpo_by_hand() -> None:
    """Mean probabilities 1/2 and 1/4: odds 1 and 1/3, so the odds ratio is 3 and sigmoid(log 3) = 3/4."""
    got = one(orpo_loss, 2 * math.log(1 / 2), 3 * math.log(1 / 4), 2, 3, beta=0.5)
    expected = {
        "nll_loss": math.log(2),
        "log_odds_chosen": math.log(3),
        "log_odds_ratio": math.log(3 / 4),
        "rewards/chosen": 0.5 * math.log(1 / 2),
        "rewards/rejected": 0.5 * math.log(1 / 4),
        "rewards/margins": 0.5 * math.log(2),
        "rewards/accuracies": 1.0,
    }
    assert got.loss.item() == pytest.approx(math.log(2) - 0.5 * math.log(3 / 4), abs=1e-12)
    assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(expected, abs=1e-12)


def test_cpo_by_hand() -> None:
    """Sums -1 and -6, beta 1/5: l = 1; the likelihood is -1 over 2 tokens."""
    assert one(cpo, -1.0, -6.0, 2, 4, beta=0.2).loss.item() == pytest.approx(log1pexp(-1) + 0.5, abs=1e-12)
    assert one(cpo_loss, -1.0, -6.0, beta=0.2).loss.item() == pytest.approx(log1pexp(-1) + 1.0, abs=1e-12)
    kw: dict[str, Any] = {"cpo_alpha": 0.5, "beta": 0.1}
    assert one(cpo, -1.0, -6.0, 2, 4, loss_type="hinge", **kw).loss.item() == pytest.approx(0.5 + 0.25, abs=1e-12)
    assert one(cpo, -1.0, -6.0, 2, 4, loss_type="ipo", **kw).loss.item() == pytest.approx(
        (1 - 5) ** 2 + 0.25, abs=1e-12
    )
    got = one(cpo, -1.0, -6.0, 2, 4, beta=0.2)
    assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(
        {
            "rewards/chosen": -0.2,
            "rewards/rejected": -1.2,
            "rewards/margins": 1,
            "rewards/accuracies": 1,
            "nll_loss": 0.5,
        }
    )


def test_simpo_without_margin_is_dpo_per_token() -> None:
    chosen, rejected, n, m = material()
    zero = torch.zeros_like(chosen)
    lengths = {"chosen_lengths": n, "rejected_lengths": m}
    mine = simpo_loss(chosen, rejected, n, m, beta=0.7, gamma=0.0, label_smoothing=0.1).loss
    theirs = dpo_loss(
        chosen, rejected, zero, zero, beta=0.7, loss_type="sigmoid_norm", label_smoothing=0.1, **lengths
    ).loss
    assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("loss_type", ["simpo", "sigmoid", "hinge", "ipo"])
@pytest.mark.filterwarnings("ignore")
def test_cpo_and_simpo_equal_trl_s(loss_type: str) -> None:
    """The whole of `CPOTrainer.get_batch_loss_metrics`; its likelihood is ours where all responses are as long."""
    trainer_module = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="compares with TRL's own code")
    chosen, rejected, *_ = material()
    lengths = torch.full((4,), 3)
    scale = lengths if loss_type in ("simpo", "ipo") else 1  # TRL: average_log_prob
    nll = -chosen.sum() / lengths.sum()
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        beta=0.4,
        cpo_alpha=0.0 if loss_type == "simpo" else 0.7,
        label_smoothing=0.0 if loss_type in ("hinge", "ipo") else 0.15,
        loss_type=loss_type,
        simpo_gamma=0.3,
        concatenated_forward=lambda *_: (chosen / scale, rejected / scale, chosen, rejected, nll),
    )
    trainer.cpo_loss = MethodType(trainer_module.CPOTrainer.cpo_loss, trainer)
    theirs, their_metrics = trainer_module.CPOTrainer.get_batch_loss_metrics(trainer, None, {})
    options: dict[str, Any] = {"beta": 0.4, "label_smoothing": trainer.label_smoothing}
    if loss_type == "simpo":
        mine = simpo_loss(chosen, rejected, lengths, lengths, gamma=0.3, **options)
    else:
        mine = cpo(chosen, rejected, lengths, lengths, loss_type=loss_type, cpo_alpha=0.7, **options)
    if loss_type == "ipo":  # TRL's CPO logs means here, and its DPO sums; ours are sums
        their_metrics |= {name: their_metrics[name] * 3 for name in REWARDS if name != "rewards/accuracies"}
    assert_same(mine, theirs, their_metrics, [chosen, rejected], 1e-12)


@pytest.mark.filterwarnings("ignore")
def test_orpo_equals_trl_s() -> None:
    """`ORPOTrainer.get_batch_loss_metrics`, which takes the odds in fp32."""
    trainer_module = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="compares with TRL's own code")
    chosen, rejected, *_ = (x.detach().float().requires_grad_() if x.is_floating_point() else x for x in material())
    lengths = torch.full((4,), 4)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        beta=0.4,
        concatenated_forward=lambda *_: (chosen / 4, rejected / 4, chosen, rejected, -chosen.sum() / lengths.sum()),
    )
    trainer.odds_ratio_loss = MethodType(trainer_module.ORPOTrainer.odds_ratio_loss, trainer)
    theirs, their_metrics = trainer_module.ORPOTrainer.get_batch_loss_metrics(trainer, None, {})
    mine = orpo_loss(chosen, rejected, lengths, lengths, beta=0.4)
    # Means of 1/8 and more in size: log(1 - e^m) and its slope are off by at most 1 / (1 - e^(-1/8)) = 8.5 ulps
    assert_same(mine, theirs, their_metrics, [chosen, rejected], 8.5 * torch.finfo(torch.float32).eps)


def assert_same(
    mine: Loss, theirs: torch.Tensor, their_metrics: dict, leaves: list[torch.Tensor], tolerance: float
) -> None:
    torch.testing.assert_close(mine.loss, theirs, rtol=tolerance, atol=tolerance)
    grads = (torch.autograd.grad(x, leaves) for x in (mine.loss, theirs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert set(mine.metrics) >= REWARDS
    for name, value in mine.metrics.items():
        assert value.item() == pytest.approx(float(their_metrics[name]), rel=max(tolerance, 1e-6)), name


def test_orpo_equals_liger_s() -> None:
    """Liger's likelihood is added outside of this function."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.orpo_loss", reason="compares with Liger's own code")
    chosen, rejected, n, m = material()
    theirs = liger.LigerFusedLinearORPOFunction.preference_loss_fn(chosen / n, rejected / m, torch.zeros(8), beta=0.4)
    mine = orpo_loss(chosen, rejected, n, m, beta=0.4)
    assert torch.allclose(mine.loss - mine.metrics["nll_loss"], theirs[0], rtol=1e-12)
    gradient = torch.autograd.grad(theirs[0] - (chosen / n).mean(), (chosen, rejected))
    torch.testing.assert_close(torch.autograd.grad(mine.loss, (chosen, rejected)), gradient, rtol=1e-10, atol=1e-12)
    for name, value in zip(("log_odds_ratio", "log_odds_chosen"), theirs[3:], strict=True):
        assert mine.metrics[name].item() == pytest.approx(value.item())


@pytest.mark.parametrize("name", FREE)
def test_gradcheck(name: str) -> None:
    function, options = FREE[name]
    chosen, rejected, n, m = material()
    assert torch.autograd.gradcheck(lambda a, b: function(a, b, n, m, **options).loss, (chosen, rejected))


@pytest.mark.parametrize("name", FREE)
def test_micro_batches_add_up(name: str) -> None:
    function, options = FREE[name]
    leaves = material(7)
    weights = torch.rand(7, dtype=torch.float64)

    def part(piece: slice, **kw: Any) -> Loss:
        return function(*(x[piece] for x in leaves), weights=weights[piece], **options, **kw)

    whole = part(slice(None))
    parts = [part(slice(a, b), normalizer=n) for a, b, n in ((0, 3, 7), (3, 4, torch.tensor(7.0)), (4, 7, 7.0))]
    total = sum(p.loss for p in parts)
    assert torch.allclose(whole.loss, total)
    assert not torch.allclose(whole.loss, function(*leaves, **options).loss)  # the weights count
    for key, value in whole.metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        assert torch.allclose(value, sum(p.metrics[key] for p in parts)), key
    grads = (torch.autograd.grad(x, leaves[:2]) for x in (whole.loss, total))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("name", FREE)
def test_far_log_probabilities_stay_finite(name: str) -> None:
    """+-200 and 0, even as means; a mean above 0 is no log-probability, and ORPO takes it for certainty."""
    function, options = FREE[name]
    far = torch.tensor([200.0, -200.0, 0.0, -1e-9])
    for beta in (0.1, 10.0):
        for shift in range(4):
            chosen, rejected = far.clone().requires_grad_(), far.roll(shift).clone().requires_grad_()
            out = function(chosen, rejected, torch.ones(4), torch.ones(4), **{**options, "beta": beta})
            assert out.loss.isfinite()
            assert out.loss.dtype == torch.float32
            assert all(value.isfinite() for value in out.metrics.values())
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss, (chosen, rejected)))


def test_two_impossible_responses_differ_by_nothing() -> None:
    impossible = torch.tensor([-INF], requires_grad=True)
    length = torch.ones(1)
    assert simpo_loss(impossible, impossible, length, length, gamma=0.0).loss.item() == pytest.approx(math.log(2))
    for loss_type, expected in (("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)):
        out = cpo_loss(impossible, impossible, loss_type=loss_type, cpo_alpha=0.0)
        assert out.loss.item() == pytest.approx(expected)
        assert torch.autograd.grad(out.loss, impossible)[0].item() == 0.0
        assert out.metrics["rewards/margins"].item() == 0.0
        assert out.metrics["rewards/accuracies"].item() == 0.0
    out = orpo_loss(impossible, impossible, length, length)
    assert out.metrics["log_odds_chosen"].item() == 0.0
    assert out.loss.item() == INF  # the likelihood of what cannot be
    assert torch.autograd.grad(out.loss, impossible)[0].item() == -1.0


def test_low_precision_and_no_pairs() -> None:
    chosen, rejected, n, m = material()
    for function, options in FREE.values():
        low = function(chosen.bfloat16(), rejected.bfloat16(), n.double(), m, **options, weights=torch.ones(4).double())
        assert {x.dtype for x in (low.loss, *low.metrics.values())} == {torch.float32}
        empty = torch.zeros(0, requires_grad=True)
        out = function(empty, empty, torch.zeros(0), torch.zeros(0), **options)
        out.loss.backward()
        assert out.loss.item() == 0.0
