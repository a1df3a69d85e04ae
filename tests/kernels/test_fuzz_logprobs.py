"""Any shape, layout, mask, dtype, option and plan of log-probabilities and exact KL, against the references in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onecard_kernels import linear_kl, linear_logprobs, selective_log_softmax
from onecard_kernels.records import Head
from tests.closeness import FLOOR_ULPS, assert_within, error
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS
from tests.kernels.fuzz_material import (
    DTYPES,
    LEADING,
    derive,
    doubled,
    draws,
    few,
    fuzz,
    head_of,
    layout,
    mask_of,
    plan_of,
    seed,
)


def assert_gradients(got: list[Tensor], eager: list[Tensor], truth: list[Tensor], terms: float) -> None:
    """`terms`: the size of what is summed to one entry. Eager can be exact by luck in so few tokens: besides twice its
    error, rounding each of those terms once or twice in fp32 is allowed for."""
    for mine, other, true in zip(got, eager, truth, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == true.shape
        inner = torch.float64 if mine.dtype == torch.float64 else torch.float32
        largest = float(true.abs().max()) if true.numel() else 0.0
        eager_off = 0.0 if inner == torch.float64 else error(other, true)
        tolerance = 2.0 * eager_off + FLOOR_ULPS * torch.finfo(mine.dtype).eps * largest
        assert_within(mine, true, tolerance + 16 * torch.finfo(inner).eps * terms, "gradient")


def finite_sum(x: Tensor, by: Tensor) -> Tensor:
    return (x * by.to(x.dtype)).masked_fill(x.isinf(), 0.0).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logprobs(backend: str) -> None:
    @fuzz(few(backend, 250, 15))
    @given(draws)
    def check(data: Any) -> None:
        draw = data.draw
        seed(draw)
        shape, d, v = draw(LEADING), draw(st.integers(1, 6)), draw(st.integers(1, 60))
        if backend == "triton":
            shape = shape[:1]
        dtype = draw(st.sampled_from(DTYPES))
        hidden, weight = torch.randn(*shape, d).to(dtype), (torch.randn(v, d) * 2).to(dtype)
        hidden, weight = layout(draw, hidden), layout(draw, weight)
        targets, mask = layout(draw, torch.randint(v, shape)), mask_of(draw, shape)
        head = head_of(draw, v, dtype)
        train, entropy = draw(st.booleans()), draw(st.booleans())
        kw = {**head, "mask": mask, "entropy_requires_grad": entropy, "return_log_sum_sq_probs": draw(st.booleans())}
        by = layout(draw, torch.randn(shape))

        def run(fn: Any, to: torch.dtype | None, **more: Any) -> tuple[Any, list[Tensor]]:
            tensors = [x if to is None else x.to(to) for x in (hidden, weight)]
            leaves = [x.detach().requires_grad_() for x in tensors[: 2 if train else 1]]
            options = kw if to is None else doubled(kw)
            out = fn(*leaves, *tensors[len(leaves) :], targets, **options, **more)
            total = finite_sum(out.logprobs, by)
            return out, derive(total + out.entropy.sum() if entropy else total, leaves)

        truth, true_grads = run(oracle.linear_logprobs, torch.float64)
        _, eager_grads = run(oracle.linear_logprobs, None)
        with plan_of(draw):
            got, grads = run(linear_logprobs, None, backend=backend)
        largest = float((hidden.double() @ weight.double().T).abs().max()) if hidden.numel() else 0.0
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        # a few roundings of numbers as large as the largest logit; sums of up to 60 squares for the last
        tolerance = 16 * eps * (1 + largest * abs(head["logit_scale"]) + 4) / min(1.0, head["temperature"])
        for mine, true in zip(got, truth, strict=True):
            assert (mine is None) == (true is None)
            if true is not None:
                assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert_within(mine, true, tolerance)
        wide = max(1.0, largest) * max(
            1.0, float(weight.abs().max()), float(hidden.abs().max()) if hidden.numel() else 1.0
        )
        tokens = max(1, math.prod(shape)) if train else 1
        assert_gradients(grads, eager_grads, true_grads, 8 * wide * tokens)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_log_softmax(backend: str) -> None:
    @fuzz(few(backend, 250, 15))
    @given(draws)
    def check(data: Any) -> None:
        draw = data.draw
        seed(draw)
        shape, v, dtype = draw(LEADING), draw(st.integers(1, 60)), draw(st.sampled_from(DTYPES))
        if backend == "triton":
            shape = shape[:1]
        logits = layout(draw, (torch.randn(*shape, v) * draw(st.sampled_from([1.0, 8.0]))).to(dtype))
        targets, mask, by = (
            layout(draw, torch.randint(v, shape)),
            mask_of(draw, shape),
            layout(draw, torch.randn(shape)),
        )
        kw: dict[str, Any] = {"temperature": draw(st.sampled_from([1.0, 0.5])), "mask": mask}
        kw["entropy_requires_grad"] = draw(st.booleans())

        def run(fn: Any, to: torch.dtype, **more: Any) -> tuple[Any, list[Tensor]]:
            leaf = logits.to(to).detach().requires_grad_()
            out = fn(leaf, targets, **kw, **more)
            total = (out.logprobs * by.to(out.logprobs)).sum()
            return out, derive(total + out.entropy.sum() if kw["entropy_requires_grad"] else total, [leaf])

        truth, true_grads = run(oracle.selective_log_softmax, torch.float64)
        _, eager_grads = run(oracle.selective_log_softmax, dtype)
        got, grads = run(selective_log_softmax, dtype, backend=backend)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        largest = float(logits.detach().abs().max()) / kw["temperature"] if logits.numel() else 0.0
        for mine, true in zip(got[:2], truth[:2], strict=True):
            if true is not None:
                assert_within(mine, true, 8 * eps * (largest + 5))
        assert_gradients(grads, eager_grads, true_grads, 2 * max(1.0, largest))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_kl(backend: str) -> None:
    @fuzz(few(backend, 250, 15))
    @given(draws)
    def check(data: Any) -> None:
        draw = data.draw
        seed(draw)
        shape, d, v = draw(LEADING), draw(st.integers(1, 6)), draw(st.integers(1, 40))
        if backend == "triton":
            shape = shape[:1]
        dtype = draw(st.sampled_from(DTYPES))
        hidden, ref = (layout(draw, torch.randn(*shape, d).to(dtype)) for _ in range(2))
        weight, head, mask = layout(draw, torch.randn(v, d).to(dtype)), head_of(draw, v, dtype), mask_of(draw, shape)
        other = draw(st.sampled_from([None, torch.randn(v, d).to(dtype)]))
        ref_bias = draw(st.sampled_from([None, torch.randn(v).to(dtype)]))
        by = torch.randn(shape)

        def eager(h: Tensor, to: torch.dtype) -> Tensor:
            given_ = {name: x.to(to) if name == "bias" and x is not None else x for name, x in head.items()}
            bias = head["bias"] if ref_bias is None and other is None else ref_bias
            z = Head(**given_).transform(h @ weight.to(to).T)
            second = Head(**{**given_, "bias": None if bias is None else bias.to(to)})
            r = second.transform(ref.to(to) @ (weight if other is None else other).to(to).T)
            logp, logq = z.log_softmax(-1), r.log_softmax(-1)
            out = head["forbidden"]
            diff = logp - logq if out is None else (logp - logq).masked_fill(out, 0.0)
            kl = (logp.exp() * diff).sum(-1)
            return kl if mask is None else torch.where(mask.bool(), kl, 0.0)

        results = []
        for fn, to in ((eager, torch.float64), (eager, dtype), (None, dtype)):
            leaf = hidden.to(to).detach().requires_grad_()
            with plan_of(draw):
                kl = (
                    fn(leaf, to)
                    if fn is not None
                    else linear_kl(
                        leaf, ref, weight, ref_weight=other, ref_bias=ref_bias, mask=mask, **head, backend=backend
                    )
                )
            results.append((kl.detach(), derive((kl * by.to(kl)).sum(), [leaf])))
        (truth, true_grads), (_, eager_grads), (got, grads) = results
        assert (got >= 0).all()
        wide = 8 * max(1.0, float(weight.abs().max())) * max(1.0, float(truth.max()) if truth.numel() else 1.0) * 4
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert_within(got, truth, 16 * eps * wide)
        assert_gradients(grads, eager_grads, true_grads, wide)

    check()
