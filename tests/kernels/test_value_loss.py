"""value_loss: both sides of the clip range by hand, in value and gradient, and what it shares with ppo_loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard_kernels import value_loss

NAN = float("nan")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# One token with old value 1. value, return, clip, loss, d loss / d value (= v - R where nothing is cut), clipfrac
BRANCHES = [
    (1.25, 2.0, 0.5, 0.28125, -0.75, 0.0),  # inside
    (0.75, 2.0, 0.5, 0.78125, -1.25, 0.0),
    (2.0, 3.0, 0.5, 1.125, 0.0, 1.0),  # up, towards R: held at 1.5, max(1, 2.25) / 2
    (2.0, 0.0, 0.5, 2.0, 2.0, 0.0),  # up, away from R: max(4, 2.25) / 2
    (0.0, -1.0, 0.5, 1.125, 0.0, 1.0),  # down, towards R: held at 0.5
    (0.0, 2.0, 0.5, 2.0, -2.0, 0.0),  # down, away
    (
        2.0,
        1.625,
        0.5,
        0.0703125,
        0.375,
        0.0,
    ),  # past R by more than the clipped value lacks: max(0.140625, 0.015625) / 2
    (2.0, 3.0, 1.5, 0.5, -1.0, 0.0),  # a wider range
    (2.0, 3.0, None, 0.5, -1.0, None),
    (0.0, -1.0, None, 0.5, 1.0, None),
]


@pytest.mark.parametrize(("value", "target", "clip", "loss", "gradient", "clipfrac"), BRANCHES)
def test_branches(
    value: float, target: float, clip: float | None, loss: float, gradient: float, clipfrac: float | None
) -> None:
    v = f64(value).requires_grad_()
    got = value_loss(v, f64(1.0), f64(target), torch.ones(1), clip=clip)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(loss, abs=1e-12)
    assert v.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert {name: x.item() for name, x in got.metrics.items()} == ({} if clip is None else {"val/clipfrac": clipfrac})


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
@pytest.mark.parametrize("normalizer", [None, 8, torch.tensor(8.0)])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, NAN]])
def test_mask_weights_and_normalizer(shape: tuple[int, ...], normalizer: Any, weights: list[float] | None) -> None:
    """Tokens of the table above: 0.28125, 1.125 (clipped), 2.0, and a masked one that holds NaN everywhere."""
    v = f64(1.25, 2.0, 2.0, NAN).view(shape).requires_grad_()
    old, target = f64(1.0, 1.0, 1.0, NAN).view(shape), f64(2.0, 3.0, 0.0, NAN).view(shape)
    mask = torch.tensor([1, 1, 1, 0]).view(shape)
    w = None if weights is None else f64(*weights).view(shape)
    got = value_loss(v, old, target, mask, clip=0.5, weights=w, normalizer=normalizer)
    got.loss.backward()
    n = 3 if normalizer is None else 8
    total, gradient = (3.40625, [-0.75, 0.0, 2.0, 0.0]) if weights is None else (3.53125, [-0.75, 0.0, 1.0, 0.0])
    assert got.loss.item() == pytest.approx(total / n)
    torch.testing.assert_close(v.grad.flatten(), f64(*gradient) / n)
    assert got.metrics["val/clipfrac"].item() == pytest.approx(1 / n)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_no_valid_token_is_zero_with_zero_gradient(clip: float | None) -> None:
    v = torch.full((2, 3), NAN, requires_grad=True)
    got = value_loss(v, v.detach(), v.detach(), torch.zeros(2, 3), clip=clip)
    got.loss.backward()
    assert got.loss.item() == 0.0
    assert torch.equal(v.grad, torch.zeros(2, 3))
    assert all(x.item() == 0.0 for x in got.metrics.values())


def test_rounding_inside_the_range_is_not_clipping() -> None:
    """old + (v - old) is not v in fp32."""
    v, old = torch.rand(2, 1000) * 0.2
    assert (old + (v - old) != v).any()
    got = value_loss(v, old, torch.randn(1000), torch.ones(1000))
    assert got.metrics["val/clipfrac"].item() == 0.0


def test_micro_batches_add_up() -> None:
    v = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    old, target, w = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(7, 5) < 0.7

    def part(piece: slice, **kw: Any) -> Any:
        return value_loss(v[piece], old[piece], target[piece], mask[piece], weights=w[piece], **kw)

    whole = part(slice(None))
    parts = [part(slice(a, b), normalizer=mask.sum()) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(sum(p.metrics["val/clipfrac"] for p in parts), whole.metrics["val/clipfrac"])
    torch.testing.assert_close(torch.autograd.grad(sum(p.loss for p in parts), v), torch.autograd.grad(whole.loss, v))


def test_dtypes_and_constants() -> None:
    low = [torch.randn(4).bfloat16() for _ in range(3)]
    for normalizer in (None, 3, torch.tensor(3.0, dtype=torch.float64)):
        got = value_loss(*low, torch.ones(4), normalizer=normalizer)
        assert got.loss.dtype == got.metrics["val/clipfrac"].dtype == torch.float32
    for i in range(3):
        mixed = [x.double() if i == j else x for j, x in enumerate(low)]
        assert value_loss(*mixed, torch.ones(4)).loss.dtype == torch.float64
    leaves = [torch.randn(4, requires_grad=True) for _ in range(4)]
    got = value_loss(*leaves[:3], torch.ones(4), weights=leaves[3])
    grads = torch.autograd.grad(got.loss, leaves, allow_unused=True)
    assert [g is not None for g in grads] == [True, False, False, False]
    assert not got.metrics["val/clipfrac"].requires_grad
