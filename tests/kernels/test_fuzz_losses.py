"""Any shape, layout, mask, dtype, option and plan of losses and advantages, against the references in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onecard_kernels import dpo_loss, gae, linear_ppo_loss, ppo_loss, value_loss
from onecard_kernels.kl.token_kl import token_kl
from tests.closeness import assert_within
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS
from tests.kernels.fuzz_material import (
    DTYPES,
    LEADING,
    NAN,
    derive,
    double,
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
from tests.kernels.policy_records import records


def policy_of(draw: Any, logp: Tensor, shape: tuple[int, ...], mask: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per-token inputs with junk where the mask is 0, and options; log-ratios off the kinks."""
    junk = torch.where(mask.bool(), 0.0, draw(st.sampled_from([0.0, NAN, 1e30])))
    d = torch.tensor([-30.0, -0.6, -0.03, 0.04, 0.5, 1.5, 30.0])[torch.randint(7, shape)]
    tokens = {
        "old_logprobs": layout(draw, (logp.float() - d + junk)) if draw(st.booleans()) else logp.float() - d + junk,
        "advantages": torch.randn(shape) + junk,
    }
    if draw(st.booleans()):
        tokens["ref_logprobs"] = logp.float() - torch.randn(shape) + junk
    if draw(st.booleans()):
        tokens["weights"] = torch.rand(shape) + junk
    options: dict[str, Any] = {
        "clip_low": draw(st.sampled_from([0.1, 0.2])),
        "clip_high": draw(st.sampled_from([0.15, 0.3])),
        "dual_clip": draw(st.sampled_from([None, 3.0])),
        "kl_coef": draw(st.sampled_from([0.0, 0.1])) if "ref_logprobs" in tokens else 0.0,
        "kl_estimator": draw(st.sampled_from(["k1", "k2", "k3"])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.2])),
        "normalizer": draw(st.sampled_from([None, 3, 2.5, torch.tensor(4)])),
    }
    return tokens, options


def full(options: dict[str, Any], tokens: dict[str, Any]) -> dict[str, Any]:
    """Every argument of the formula."""
    return {"ref_logprobs": None, "weights": None, **options, **tokens}


def near(got: Any, truth: Any, scale: float, eps: float) -> None:
    assert got.metrics.keys() == truth.metrics.keys()
    tolerance = 64 * eps * scale
    assert_within(got.loss, truth.loss, tolerance * max(1.0, abs(float(truth.loss.detach()))), "loss")
    for name, value in truth.metrics.items():
        assert_within(got.metrics[name], value, tolerance * max(1.0, abs(float(value))), name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_ppo_loss(backend: str) -> None:
    """Against the two formulas, one of the other."""

    @fuzz(few(backend, 250, 15))
    @given(draws)
    def check(data: Any) -> None:
        draw = data.draw
        seed(draw)
        shape, d, v = (
            draw(LEADING)[: 1 if backend == "triton" else 3],
            draw(st.integers(1, 5)),
            draw(st.integers(2, 40)),
        )
        dtype = torch.float64  # so that the borders are the formula's; low precision is elsewhere
        hidden, weight = layout(draw, torch.randn(*shape, d, dtype=dtype)), layout(draw, torch.randn(v, d, dtype=dtype))
        targets, mask, head = torch.randint(v, shape), mask_of(draw, shape), head_of(draw, v, dtype)
        mask = torch.ones(shape) if mask is None else mask
        logp = oracle.linear_logprobs(hidden, weight, targets, **head).logprobs
        tokens, options = policy_of(draw, logp.masked_fill(logp.isinf(), -5.0), shape, mask)
        train = draw(st.booleans())

        def run(composed: bool) -> tuple[Any, list[Tensor]]:
            leaves = [x.detach().requires_grad_() for x in ((hidden, weight) if train else (hidden,))]
            given_ = (*leaves, *(() if train else (weight,)), targets)
            if not composed:
                loss = linear_ppo_loss(*given_, mask=mask, **tokens, **options, **head, backend=backend)
            else:
                policy = oracle.linear_logprobs(*given_, mask=mask, **head, entropy_requires_grad=True)
                given_terms = records(mask=mask, entropy=policy.entropy, **full(options, tokens))
                loss = oracle.ppo_loss(policy.logprobs, **given_terms)
            return loss, derive(loss.loss, leaves)

        truth, true_grads = run(True)
        with plan_of(draw):
            got, grads = run(False)
        # e^20 stands in the loss and e^20 in the ratio, of logits that are right to 1e-15
        near(got, truth, 100.0, torch.finfo(dtype).eps)
        for mine, true in zip(grads, true_grads, strict=True):
            assert_within(mine, true, 1e-12 * max(1.0, float(true.abs().max()) if true.numel() else 0.0))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ppo_and_value_loss(backend: str) -> None:
    @fuzz(few(backend, 250, 15))
    @given(draws)
    def check(data: Any) -> None:
        draw = data.draw
        seed(draw)
        shape, dtype = draw(LEADING), draw(st.sampled_from(DTYPES))
        mask = mask_of(draw, shape)
        mask = torch.ones(shape) if mask is None else mask
        logp = layout(draw, (-3 * torch.rand(shape)).to(dtype)).requires_grad_()
        entropy = torch.rand(shape).to(dtype).requires_grad_()
        tokens, options = policy_of(draw, logp.detach(), shape, mask)
        got = ppo_loss(logp, mask=mask, entropy=entropy, **tokens, **options, backend=backend)
        leaves = [logp, entropy] if options["entropy_coef"] else [logp]
        mine = derive(got.loss, leaves)
        twins = [x.detach().double().requires_grad_() for x in (logp, entropy)]
        kw = doubled(full(options, tokens))
        truth = oracle.ppo_loss(twins[0], **records(mask=mask, entropy=twins[1], **kw))
        true = derive(truth.loss, twins[: len(leaves)])
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        near(got, truth, 10.0, eps)  # e^d is wrong by |d| <= 20 half ulps
        for a, b in zip(mine, true, strict=True):
            assert a.dtype == dtype
            largest = float(b.abs().max()) if b.numel() else 0.0
            assert_within(a, b, (torch.finfo(dtype).eps + 64 * eps) * max(largest, 1.0))

        values, old, returns = (torch.randn(shape).to(dtype) for _ in range(3))
        values = layout(draw, values).requires_grad_()
        clip = draw(st.sampled_from([None, 0.3]))
        more = {"clip": clip, "weights": tokens.get("weights"), "normalizer": options["normalizer"]}
        junk = torch.where(mask.bool(), 0.0, NAN).to(dtype)
        fit = value_loss(values, old + junk, returns + junk, mask, **more, backend=backend)
        twin = values.detach().double().requires_grad_()
        best = oracle.value_loss(twin, double(old + junk), double(returns + junk), mask, **doubled(more))
        near(fit, best, 1.0, eps)
        expected = derive(best.loss, [twin])[0]
        largest = float(expected.abs().max()) if values.numel() else 0.0
        assert_within(derive(fit.loss, [values])[0], expected, (torch.finfo(dtype).eps + 16 * eps) * max(largest, 1.0))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae(backend: str) -> None:
    @fuzz(few(backend, 250, 15))
    @given(draws)
    def check(data: Any) -> None:
        draw = data.draw
        seed(draw)
        shape, dtype = (draw(st.integers(0, 4)), draw(st.integers(0, 40))), draw(st.sampled_from(DTYPES))
        mask = mask_of(draw, shape)
        mask = torch.ones(shape) if mask is None else mask
        junk = torch.where(mask.bool(), 0.0, NAN)
        rewards, values = (layout(draw, (torch.randn(shape) + junk).to(dtype)) for _ in range(2))
        junk_inside = (rewards.isnan() | values.isnan()) & mask.bool()  # an expanded row has another one's junk
        rewards, values = (x.masked_fill(junk_inside, 0.5) if junk_inside.any() else x for x in (rewards, values))
        last = draw(st.sampled_from([None, torch.randn(shape[0]).to(dtype)]))
        kw = {"gamma": draw(st.sampled_from([1.0, 0.9, 0.0])), "lam": draw(st.sampled_from([1.0, 0.95, 0.0]))}
        got = gae(rewards, values, mask, last_values=last, **kw, backend=backend)
        truth = oracle.gae(rewards.double(), values.double(), mask, last_values=double(last), **kw)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        for mine, true in zip(got, truth, strict=True):
            # sums of up to 40 terms of a few units, each rounded once or twice
            assert_within(mine, true, 8 * eps * max(1.0, shape[1]) * 3)

    check()


@fuzz(80)
@given(draws)
def test_dpo_loss(data: Any) -> None:
    """Against the sigmoid loss as the paper has it, with cDPO's smoothing, for pairs of any memory and dtype."""
    draw = data.draw
    seed(draw)
    n, dtype = draw(st.integers(1, 6)), draw(st.sampled_from(DTYPES))
    four = [layout(draw, (-20 * torch.rand(n)).to(dtype)).requires_grad_() for _ in range(4)]
    beta, smoothing = draw(st.sampled_from([0.05, 0.1, 2.0])), draw(st.sampled_from([0.0, 0.1]))
    weights = draw(st.sampled_from([None, torch.rand(n)]))
    normalizer = draw(st.sampled_from([None, 7.0]))
    kw = {"beta": beta, "label_smoothing": smoothing, "weights": weights, "normalizer": normalizer}
    got = dpo_loss(*four, **kw)
    twins = [x.detach().double().requires_grad_() for x in four]
    x = beta * ((twins[0] - twins[2]) - (twins[1] - twins[3]))
    losses = -(1 - smoothing) * torch.nn.functional.logsigmoid(x) - smoothing * torch.nn.functional.logsigmoid(-x)
    truth = (losses * (1.0 if weights is None else weights.double())).sum() / (normalizer or n)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert_within(got.loss, truth, 16 * eps * max(1.0, 40 * beta))
    for mine, true in zip(derive(got.loss, four[:2]), torch.autograd.grad(truth, twins[:2]), strict=True):
        assert_within(mine, true, (torch.finfo(dtype).eps + 16 * eps * max(1.0, 40 * beta)) * beta)


@fuzz(60)
@given(draws)
def test_token_kl(data: Any) -> None:
    draw = data.draw
    seed(draw)
    shape, dtype = draw(LEADING), draw(st.sampled_from(DTYPES))
    logp, ref = (layout(draw, (-5 * torch.rand(shape)).to(dtype)) for _ in range(2))
    estimator = draw(st.sampled_from(["k1", "k2", "k3"]))
    d = logp.double() - ref.double()
    truth = {"k1": d, "k2": d.square() / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert_within(token_kl(logp, ref, estimator=estimator), truth, 8 * eps * (5 + math.exp(5)))
