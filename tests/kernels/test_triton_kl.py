"""The Triton row pass of the exact vocabulary KL against the formula in fp64, and against what KL must be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from onecard_kernels.records import Head
from tests.closeness import assert_like_eager, assert_within, error
from tests.kernels.operator_material import HEAD_KINDS, head_options

triton = pytest.importorskip("triton")
import triton.language as tl

from onecard_kernels.kl import triton as kernels
from onecard_kernels.kl.triton import excess, kl_pass_, tanh_slope


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks at test sizes, the last one not full."""
    monkeypatch.setattr(kernels, "BLOCK", 64)


def head_of(kind: str, v: int) -> tuple[Head, torch.Tensor | None]:
    """A head and the reference's own bias."""
    options = head_options(kind, v)
    return Head(**options), torch.randn(v) if "bias" in options else None


def naive(z: torch.Tensor, r: torch.Tensor, head: Head, ref_bias: torch.Tensor | None) -> torch.Tensor:
    """sum_v p_v (log p_v - log q_v), for autograd to differentiate."""
    ref = Head(ref_bias, head.temperature, head.logit_scale, head.softcap, head.forbidden)
    logp, logq = (torch.log_softmax(h.transform(x), -1) for h, x in ((head, z), (ref, r)))
    possible = torch.ones_like(logp, dtype=torch.bool) if head.forbidden is None else ~head.forbidden
    return (logp.exp() * (logp - logq).masked_fill(~possible, 0.0)).masked_fill(~possible, 0.0).sum(-1)


def value_and_gradient(
    z: torch.Tensor, r: torch.Tensor, head: Head, ref_bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = z.to(dtype, copy=True).requires_grad_()
    kl = naive(leaf, r.to(dtype), head, ref_bias)
    kl.sum().backward()
    assert leaf.grad is not None
    return kl.detach(), leaf.grad


def compare(z: torch.Tensor, r: torch.Tensor, head: Head, ref_bias: torch.Tensor | None = None) -> None:
    truth, true_grad = value_and_gradient(z, r, head, ref_bias, torch.float64)
    eager, eager_grad = value_and_gradient(z, r, head, ref_bias, torch.float32)
    into = z.clone()
    got = kl_pass_(into, r, head, ref_bias=ref_bias, out=into)
    assert_like_eager(got, eager, truth, "KL")
    assert_like_eager(into, eager_grad, true_grad, "dKL/dz")


@triton.jit
def _apply(x, out, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, FUNCTION(tl.load(x + at)))


@pytest.mark.parametrize(
    ("function", "truth", "high"),
    [(excess, lambda d: torch.expm1(-d) + d, 1.0), (tanh_slope, lambda x: 1 / torch.cosh(x) ** 2, 40.0)],
)
def test_functions_are_right_to_some_units_in_the_last_place(function: Any, truth: Any, high: float) -> None:
    x = torch.logspace(-4, math.log10(high), 4096)[:-1]
    x = torch.cat([-x, x, torch.ones(2)])
    out = torch.empty_like(x)
    _apply[(1,)](x, out, FUNCTION=function, SIZE=8192)
    # Series: 4 ulps. exp(-80): half an ulp of 80 in the exponent besides.
    tolerance = torch.finfo(torch.float32).eps * (4 + high)
    assert float((out / truth(x.double()) - 1).abs().max()) < tolerance


# One row and one column; a block exactly, one more, and several with a part.
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64), (2, 65), (5, 300)])
@pytest.mark.parametrize("std", [4.0, 30.0])
def test_value_and_direction_by_shape(shape: tuple[int, int], std: float) -> None:
    compare(torch.randn(shape) * std, torch.randn(shape) * std, Head())


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_part_of_the_head(kind: str) -> None:
    head, ref_bias = head_of(kind, 300)
    compare(torch.randn(4, 300) * 4, torch.randn(4, 300) * 4, head, ref_bias)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_zero_between_equals(kind: str) -> None:
    head, _ = head_of(kind, 300)
    z = torch.randn(4, 300) * 10
    out = torch.empty_like(z)
    assert kl_pass_(z, z.clone(), head, ref_bias=head.bias, out=out).tolist() == [0.0] * 4
    assert torch.equal(out, torch.zeros_like(z))


@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_near_the_reference_nothing_cancels(kind: str) -> None:
    """Hidden states that differ by 1e-4: KL is near 1e-7, where the plain fp32 sum is rounding and often negative."""
    head, _ = head_of(kind, 300)
    hidden, weight = torch.randn(6, 32, dtype=torch.float64), torch.randn(300, 32, dtype=torch.float64) * 4 / 32**0.5
    z = (hidden @ weight.T).float()
    r = ((hidden + 1e-4 * torch.randn_like(hidden)) @ weight.T).float()
    truth, true_grad = value_and_gradient(z, r, head, None, torch.float64)
    eager, eager_grad = value_and_gradient(z, r, head, None, torch.float32)
    out = torch.empty_like(z)
    got = kl_pass_(z, r, head, out=out)
    assert float(truth.max()) < 1e-6
    assert bool((got > 0).all())
    off, eager_off = ((x.double() / truth - 1).abs().max() for x in (got, eager))
    # The logits differ by 4e-4 and, where tanh is taken of them, have errors of an ulp of 5: 1e-3 each, averaged.
    assert off < 1e-3
    assert eager_off > 0.05
    # The direction is linear in d: behind tanh it has the rounding of the logits, as eager has it.
    assert error(out, true_grad) < (0.5 if kind == "plain" else 2.0) * error(eager_grad, true_grad)


@pytest.mark.parametrize(
    ("p", "q", "expected"), [(0.5, 0.25, 0.14384104), (0.25, 0.5, 0.13081204), (1e-6, 0.5, 0.69313237)]
)
def test_two_tokens_by_hand(p: float, q: float, expected: float) -> None:
    """p log(p/q) + (1-p) log((1-p)/(1-q))."""
    z, r = (torch.tensor([[x, 1 - x]], dtype=torch.float64).log().float() for x in (p, q))
    assert_within(kl_pass_(z, r, Head()), torch.tensor([expected]), 1e-7)


def test_mass_of_the_reference_where_the_policy_has_none() -> None:
    """p underflows at the reference's favourite: q - p + p d must still count q there, or KL is off by all of it."""
    z, r = torch.zeros(1, 70), torch.zeros(1, 70)
    z[0, 69], r[0, 69] = -200.0, 3.0
    compare(z, r, Head())
    compare(r, z, Head())


def test_infinite_where_the_reference_excludes_a_token() -> None:
    z, r = torch.randn(3, 70), torch.randn(3, 70)
    r[0, 66] = float("-inf")
    z[2, 3] = float("-inf")
    out = torch.empty_like(z)
    got = kl_pass_(z, r, Head(), out=out)
    assert got.isinf().tolist() == [True, False, False]
    assert not out.isnan().any()
    assert torch.equal(out[0], torch.zeros(70))
    allowed = torch.arange(70) != 3
    assert_within(
        got[2],
        (
            naive(z[2:, allowed].double(), r[2:].double()[:, allowed], Head(), None)
            - torch.log_softmax(r[2].double(), 0)[allowed].logsumexp(0)
        )[0],
        1e-6,
    )
    z[1, 5] = float("nan")
    got = kl_pass_(z, r, Head(), out=out)
    assert got.isnan().tolist() == [False, True, False]
    assert out.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_direction_in_low_precision(dtype: torch.dtype) -> None:
    z, r = torch.randn(3, 130) * 4, torch.randn(3, 130) * 4
    full, low = torch.empty_like(z), torch.empty_like(z, dtype=dtype)
    before = z.clone()
    kl = kl_pass_(z, r, Head(), out=full)
    assert torch.equal(kl, kl_pass_(z, r, Head(), out=low))
    assert torch.equal(z, before)
    # One unit in the last place of each entry: the interpreter's casts truncate.
    ulp = torch.finfo(dtype).eps * full.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((low.float() - full).abs() <= ulp).all())


def test_rows_apart_and_twice_the_same() -> None:
    """Every second row, with other row strides for each; what lies between is not written."""
    big_z, big_r, big_out = torch.randn(6, 150), torch.randn(6, 140), torch.full((6, 135), 7.0)
    z, r, out = big_z[::2, :131], big_r[1::2, 3:134], big_out[::2, 4:]
    got = kl_pass_(z, r, Head(), out=out)
    dense = torch.empty(3, 131)
    assert torch.equal(got, kl_pass_(z.contiguous(), r.contiguous(), Head(), out=dense))
    assert torch.equal(out, dense)
    assert bool((big_out[1::2] == 7).all() and (big_out[:, :4] == 7).all())


def test_no_rows() -> None:
    assert kl_pass_(torch.empty(0, 7), torch.empty(0, 7), Head()).shape == (0,)


def test_what_it_does_not_take() -> None:
    z, r = torch.randn(2, 7), torch.randn(2, 7)
    with pytest.raises(TypeError, match=r"r has dtype torch.float64, expected torch.float32"):
        kl_pass_(z, r.double(), Head())
    with pytest.raises(ValueError, match=r"r has shape \(2, 6\), expected \(2, 7\), the shape of z"):
        kl_pass_(z, r[:, :6], Head())
    with pytest.raises(ValueError, match=r"out has stride 2 along the vocabulary, expected 1"):
        kl_pass_(z, r, Head(), out=torch.empty(7, 2).t())
