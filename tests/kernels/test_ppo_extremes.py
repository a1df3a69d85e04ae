"""ppo_loss where log-ratios are far out, or infinite."""

from __future__ import annotations

import math

import pytest
import torch

from onecard_kernels import ppo_loss

INF = float("inf")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


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


def test_two_impossible_tokens_agree() -> None:
    logp = f64(-INF, -1.0).requires_grad_()
    same = f64(-INF, -1.0)
    got = ppo_loss(logp, same, f64(2.0, 3.0), torch.ones(2), ref_logprobs=same, kl_coef=1.0)
    got.loss.backward()
    assert got.loss.item() == -2.5  # ratios 1
    assert torch.equal(logp.grad, f64(0.0, -1.5))
    assert got.metrics["policy/approxkl"].item() == got.metrics["policy/kl"].item() == 0.0
