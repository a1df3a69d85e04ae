"""ppo_loss: every branch by hand in value and gradient, and the identities that policy gradients obey."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from onecard_kernels import linear_ppo_loss, logits_ppo_loss, ppo_loss

INF, NAN = float("inf"), float("nan")
LOG2 = math.log(2)
OLD = -1.5


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(ratios: list[float], advantages: list[float], mask: list[int] | None = None) -> dict[str, torch.Tensor]:
    return {
        "logprobs": (OLD + f64(*ratios).log()).requires_grad_(),
        "old_logprobs": torch.full((len(ratios),), OLD, dtype=torch.float64),
        "advantages": f64(*advantages),
        "mask": torch.tensor(mask if mask is not None else [1] * len(ratios)),
    }


# One token. advantage, ratio, options, loss, d loss / d logp (= -A ratio where nothing is cut), clipfrac
BRANCHES = [
    # A > 0, range 0.8 to 1.2
    (2.0, 1.1, {}, -2.2, -2.2, 0.0),
    (2.0, 1.5, {}, -2.4, 0.0, 1.0),  # max(-3, -2.4)
    (2.0, 0.5, {}, -1.0, -1.0, 0.0),  # max(-1, -1.6)
    # A < 0
    (-2.0, 1.1, {}, 2.2, 2.2, 0.0),
    (-2.0, 1.5, {}, 3.0, 3.0, 0.0),  # max(3, 2.4)
    (-2.0, 0.5, {}, 1.6, 0.0, 1.0),  # max(1, 1.6)
    (0.0, 1.5, {}, 0.0, 0.0, 0.0),
    # each side of the range has its own width: 0.9 to 1.3
    (2.0, 1.25, {"clip_low": 0.1, "clip_high": 0.3}, -2.5, -2.5, 0.0),
    (2.0, 1.4, {"clip_low": 0.1, "clip_high": 0.3}, -2.6, 0.0, 1.0),
    (-2.0, 0.85, {"clip_low": 0.1, "clip_high": 0.3}, 1.8, 0.0, 1.0),
    (-2.0, 0.95, {"clip_low": 0.1, "clip_high": 0.3}, 1.9, 1.9, 0.0),
    # dual clip: at most 3 * 2 where A < 0, nothing else changes
    (-2.0, 4.0, {}, 8.0, 8.0, 0.0),
    (-2.0, 4.0, {"dual_clip": 3.0}, 6.0, 0.0, 0.0),  # cut, but not by the range
    (-2.0, 2.0, {"dual_clip": 3.0}, 4.0, 4.0, 0.0),
    (-2.0, 0.5, {"dual_clip": 3.0}, 1.6, 0.0, 1.0),
    (2.0, 4.0, {"dual_clip": 3.0}, -2.4, 0.0, 1.0),
    (2.0, 1.1, {"dual_clip": 3.0}, -2.2, -2.2, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "options", "loss", "gradient", "clipfrac"), BRANCHES)
def test_branches(
    advantage: float, ratio: float, options: dict[str, Any], loss: float, gradient: float, clipfrac: float
) -> None:
    batch = tokens([ratio], [advantage])
    got = ppo_loss(**batch, **options)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(loss, abs=1e-12)
    assert batch["logprobs"].grad.item() == pytest.approx(gradient, abs=1e-12)
    assert {name: value.item() for name, value in got.metrics.items()} == {
        "policy/approxkl": pytest.approx(math.log(ratio) ** 2 / 2),
        "policy/clipfrac": clipfrac,
        "val/ratio": pytest.approx(ratio),
    }


# logp = -1 against ref_logp = -1 - log 2: d = log 2. k1 = d, k2 = d^2 / 2, k3 = 1/2 - 1 + d; derivatives 1, d, 1 - 1/2
KL = [("k1", LOG2, 1.0), ("k2", LOG2**2 / 2, LOG2), ("k3", LOG2 - 0.5, 0.5)]


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize(("estimator", "kl", "slope"), KL)
def test_entropy_and_divergence(estimator: str, kl: float, slope: float, weight: float) -> None:
    logp, entropy = f64(-1.0).requires_grad_(), f64(2.0).requires_grad_()
    got = ppo_loss(
        logp,
        f64(-1.0),
        f64(4.0),
        torch.ones(1),
        entropy=entropy,
        entropy_coef=0.25,
        ref_logprobs=f64(-1.0 - LOG2),
        kl_coef=0.5,
        kl_estimator=estimator,
        weights=f64(weight),
    )
    got.loss.backward()
    # ratio 1: pg = -4, its derivative -4; entropy -0.25 * 2
    assert got.loss.item() == pytest.approx(weight * (-4.0 - 0.5 + 0.5 * kl), abs=1e-12)
    assert logp.grad.item() == pytest.approx(weight * (-4.0 + 0.5 * slope), abs=1e-12)
    assert entropy.grad.item() == pytest.approx(-0.25 * weight)
    assert got.metrics["policy/entropy"].item() == 2.0
    assert got.metrics["policy/kl"].item() == pytest.approx(kl)


def test_terms_that_are_off_are_measured_only() -> None:
    logp, entropy = f64(-1.0).requires_grad_(), f64(INF).requires_grad_()
    plain = ppo_loss(logp, f64(-1.0), f64(4.0), torch.ones(1))
    off = ppo_loss(logp, f64(-1.0), f64(4.0), torch.ones(1), entropy=entropy, ref_logprobs=f64(-INF), kl_estimator="k1")
    assert off.loss.item() == plain.loss.item() == -4.0
    assert torch.autograd.grad(off.loss, (logp, entropy), allow_unused=True) == (f64(-4.0), None)
    assert set(off.metrics) - set(plain.metrics) == {"policy/entropy", "policy/kl"}
    assert off.metrics["policy/entropy"].item() == off.metrics["policy/kl"].item() == INF


# Losses -2.2, -2.4 (clipped), 3.0; log-ratios of the ratios; the fourth token is masked.
ROW: dict[str, Any] = {"ratios": [1.1, 1.5, 1.5, 1.0], "advantages": [2.0, 2.0, -2.0, 1.0], "mask": [1, 1, 1, 0]}


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 4, 1)])
@pytest.mark.parametrize("normalizer", [None, 8, torch.tensor(8), torch.tensor(8.0)])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, NAN]])
def test_mask_weights_and_normalizer(shape: tuple[int, ...], normalizer: Any, weights: list[float] | None) -> None:
    batch = {name: x.detach().clone().view(shape) for name, x in tokens(**ROW).items()}
    logp = batch["logprobs"].requires_grad_()
    w = None if weights is None else f64(*weights).view(shape)
    got = ppo_loss(**batch, weights=w, normalizer=normalizer)
    got.loss.backward()
    n = 3 if normalizer is None else 8
    total = -2.2 - 2.4 + 3.0 if weights is None else -2.2 - 4.8 + 1.5
    gradient = [-2.2, 0.0, 3.0, 0.0] if weights is None else [-2.2, 0.0, 1.5, 0.0]
    assert got.loss.item() == pytest.approx(total / n)
    torch.testing.assert_close(logp.grad.flatten(), f64(*gradient) / n)
    # weights count in the loss only
    assert got.metrics["policy/clipfrac"].item() == pytest.approx(1 / n)
    assert got.metrics["val/ratio"].item() == pytest.approx(4.1 / n)
    assert got.metrics["policy/approxkl"].item() == pytest.approx((math.log(1.1) ** 2 / 2 + math.log(1.5) ** 2) / n)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_masked_tokens_may_hold_anything(junk: float, mask_dtype: torch.dtype) -> None:
    """In every input, and without a trace in loss, metrics or gradient."""
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=mask_dtype)
    names = ["logprobs", "old_logprobs", "advantages", "entropy", "ref_logprobs", "weights"]
    clean = {name: torch.randn(3, 5) * 0.3 for name in names}
    options = {"entropy_coef": 0.1, "kl_coef": 0.2, "dual_clip": 2.0}

    def run(batch: dict[str, torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        leaves = [batch[name].requires_grad_() for name in ("logprobs", "entropy")]
        got = ppo_loss(**batch, mask=mask, **options)
        return got, list(torch.autograd.grad(got.loss, leaves))

    dirty = {name: x.masked_fill(mask == 0, junk) for name, x in clean.items()}
    (a, a_grads), (b, b_grads) = run(clean), run(dirty)
    assert torch.equal(a.loss, b.loss)
    assert a.metrics == b.metrics
    for one, other in zip(a_grads, b_grads, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(other[mask == 0], torch.zeros(9))
        assert (other[mask == 1] != 0).any()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def test_no_valid_token_is_zero_with_zero_gradient(shape: tuple[int, ...]) -> None:
    logp = torch.full(shape, NAN, requires_grad=True)
    nothing = torch.full(shape, NAN)
    got = ppo_loss(logp, nothing, nothing, torch.zeros(shape), entropy=nothing, ref_logprobs=nothing, kl_coef=1.0)
    got.loss.backward()
    assert got.loss.item() == 0.0
    assert torch.equal(logp.grad, torch.zeros(shape))
    assert [value.item() for value in got.metrics.values()] == [0.0] * 5


def test_at_ratio_one_the_gradient_is_reinforce_s() -> None:
    """Also where clip_low = 0 puts the ratio on the border of the range, and on max's tie."""
    logp, a = -torch.rand(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.6
    for options in ({}, {"clip_low": 0.0, "clip_high": 0.0}, {"dual_clip": 1.5}):
        leaf = logp.clone().requires_grad_()
        ppo_loss(leaf, logp, a, mask, **options).loss.backward()
        torch.testing.assert_close(leaf.grad, torch.where(mask, -a / mask.sum(), 0.0))


def test_micro_batches_add_up() -> None:
    """With one `normalizer`, in loss, gradient and every metric; without it each would average by itself."""
    logp = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    entropy = torch.rand(7, 5, dtype=torch.float64, requires_grad=True)
    old, a, ref, w = (torch.randn(7, 5, dtype=torch.float64) for _ in range(4))
    mask = torch.rand(7, 5) < 0.7

    def part(piece: slice, **kw: Any) -> Any:
        tensors = {"entropy": entropy[piece], "ref_logprobs": ref[piece], "weights": w[piece]}
        coefs = {"entropy_coef": 0.1, "kl_coef": 0.3}
        return ppo_loss(logp[piece], old[piece], a[piece], mask[piece], **tensors, **coefs, **kw)

    whole = part(slice(None))
    n = mask.sum()
    parts = [part(slice(a, b), normalizer=n) for a, b, n in ((0, 3, n), (3, 4, n.item()), (4, 7, n.double()))]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    assert len(whole.metrics) == 5
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[name] for p in parts), value)
    leaves = (logp, entropy)
    torch.testing.assert_close(
        torch.autograd.grad(sum(p.loss for p in parts), leaves), torch.autograd.grad(whole.loss, leaves)
    )


def test_gradients_go_to_logprobs_and_entropy_only() -> None:
    names = ["logprobs", "old_logprobs", "advantages", "entropy", "ref_logprobs", "weights"]
    batch = {name: (torch.randn(6) * 0.05).requires_grad_() for name in names}
    normalizer = torch.tensor(3.0, requires_grad=True)
    got = ppo_loss(**batch, mask=torch.ones(6), entropy_coef=0.1, kl_coef=0.1, normalizer=normalizer)
    grads = torch.autograd.grad(got.loss, [*batch.values(), normalizer], allow_unused=True)
    assert [g is not None for g in grads] == [True, False, False, True, False, False, False]
    assert not any(value.requires_grad for value in got.metrics.values())


def test_dtypes_and_shapes_of_results() -> None:
    low = {name: x.detach().bfloat16() for name, x in tokens(**ROW).items() if name != "mask"}
    for normalizer in (None, 3, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)):
        got = ppo_loss(**low, mask=torch.ones(4), entropy=low["logprobs"], normalizer=normalizer)
        for value in (got.loss, *got.metrics.values()):
            assert value.dtype == torch.float32
            assert value.shape == ()
    low |= {name: low["logprobs"] for name in ("entropy", "ref_logprobs", "weights")}
    for name in low:
        assert ppo_loss(**{**low, name: low[name].double()}, mask=torch.ones(4)).loss.dtype == torch.float64


@pytest.mark.parametrize("function", [ppo_loss, logits_ppo_loss, linear_ppo_loss])
def test_defaults(function: Any) -> None:
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    expected = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "entropy_coef": 0.0, "kl_coef": 0.0}
    expected |= {"kl_estimator": "k3", "ref_logprobs": None, "weights": None, "normalizer": None, "backend": "auto"}
    assert expected.items() <= defaults.items()


def test_low_precision_inputs_are_subtracted_in_fp32() -> None:
    """bf16 keeps 8 bits: -8 - (-0.0625) is -7.9375 in fp32, and -7.9375 rounds to -7.9375 or -8 only by luck."""
    logp, old = torch.tensor([-8.0]).bfloat16(), torch.tensor([-0.01]).bfloat16()
    got = ppo_loss(logp, old, torch.tensor([1.0]), torch.ones(1))
    assert got.metrics["policy/approxkl"].item() == pytest.approx((8 + old.item()) ** 2 / 2, rel=1e-6)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("d", [200.0, -200.0, 100.0, INF, -INF])
def test_log_ratios_of_200_are_finite_in_loss_and_gradient(d: float, advantage: float, dual_clip: float | None) -> None:
    """Clamped to +-20, with zero gradient outside."""
    logp = torch.tensor([-1.0 if d > 0 else d - 1.0], requires_grad=True)
    old = torch.tensor([-1.0 - d if d > 0 else -1.0])
    got = ppo_loss(logp, old, torch.tensor([advantage]), torch.ones(1), dual_clip=dual_clip)
    got.loss.backward()
    far = math.exp(math.copysign(20.0, d))
    if d > 0:
        expected = -1.2 if advantage > 0 else far if dual_clip is None else 3.0
    else:
        expected = -far if advantage > 0 else 0.8
    assert got.loss.item() == pytest.approx(expected, rel=1e-5)
    assert logp.grad.item() == 0.0
    assert got.metrics["policy/approxkl"].item() == 200.0
    assert got.metrics["val/ratio"].item() == pytest.approx(far, rel=1e-5)


def test_the_clamp_leaves_what_lies_inside() -> None:
    logp = f64(19.0).requires_grad_()
    ppo_loss(logp, f64(0.0), f64(-1.0), torch.ones(1)).loss.backward()
    assert logp.grad.item() == pytest.approx(math.exp(19.0))
