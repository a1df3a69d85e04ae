"""token_kl: identities between the estimators, hand-worked constants, and the places where it must stay finite."""

from __future__ import annotations

import math

import pytest
import torch

from onecard_kernels import token_kl

INF = float("inf")


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", math.log(2)),  # d = log 2
        ("k2", math.log(2) ** 2 / 2),
        ("k3", math.log(2) - 0.5),  # exp(-log 2) - 1 + log 2
    ],
)
def test_constants(estimator: str, expected: float) -> None:
    got = token_kl(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), estimator=estimator)
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_expectations_over_the_policy_are_the_divergence() -> None:
    """sum_v p_v k1 = sum_v p_v k3 = KL(p || q), exactly; k3 is never negative."""
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        assert torch.allclose((p.exp() * token_kl(p, q, estimator=estimator)).sum(), kl, rtol=1e-12)
    assert (token_kl(p, q, estimator="k3") >= 0).all()
    d = token_kl(p, q, estimator="k1")
    assert torch.allclose(token_kl(p, q, estimator="k2"), d**2 / 2)


def test_expected_gradient_of_k2_is_the_divergence_s() -> None:
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    q = torch.randn(20, dtype=torch.float64).log_softmax(-1)
    p = logits.log_softmax(-1)
    exact = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)[0]
    sampled = torch.autograd.grad((p.exp().detach() * token_kl(p, q, estimator="k2")).sum(), logits)[0]
    assert torch.allclose(exact, sampled, rtol=1e-10)


def test_small_log_ratios_keep_their_digits() -> None:
    """exp(-d) - 1 + d in fp32 is 0 or 6e-8 here; the true value is 5e-9."""
    got = token_kl(torch.tensor([1e-4]), torch.tensor([0.0]), estimator="k3")
    assert got.item() == pytest.approx(5e-9, rel=2e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("d", [-200.0, 200.0, -88.0])
def test_large_log_ratios_are_finite_in_value_and_gradient(estimator: str, d: float) -> None:
    logp = torch.tensor([d], requires_grad=True)
    value = token_kl(logp, torch.zeros(1), estimator=estimator)
    value.backward()
    assert value.isfinite().all()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
    if estimator == "k3":
        limit = math.copysign(20.0, d)
        assert value.item() == pytest.approx(math.expm1(-limit) + limit, rel=1e-6)
        assert logp.grad.item() == 0.0
    else:
        assert logp.grad.item() == (1.0 if estimator == "k1" else d)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_two_impossible_tokens_agree(estimator: str) -> None:
    logp = torch.tensor([-INF, -1.0], requires_grad=True)
    ref = torch.tensor([-INF, -2.0], requires_grad=True)
    value = token_kl(logp, ref, estimator=estimator)
    value.sum().backward()
    assert value[0] == 0.0
    assert value[1] > 0.0
    for leaf in (logp, ref):
        assert leaf.grad is not None
        assert leaf.grad[0] == 0.0
        assert leaf.grad[1].isfinite()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_and_dtypes(estimator: str) -> None:
    args = tuple(torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: token_kl(a, b, estimator=estimator), args)
    assert token_kl(*args, estimator=estimator).dtype == torch.float64
    low = [x.detach().bfloat16() for x in args]
    assert token_kl(*low, estimator=estimator).dtype == torch.float32
