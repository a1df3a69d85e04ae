"""linear_ppo_loss forms its gradients in its forward: they are those of the two functions it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onecard_kernels import linear_logprobs, linear_ppo_loss, ppo_loss
from onecard_kernels.logprob import tuning
from tests.closeness import assert_like_eager, assert_within
from tests.kernels.backends import needs_triton
from tests.kernels.linear_ppo_material import (
    EPS,
    LEAVES,
    D,
    V,
    batch,
    chunked_only,
    composed,
    eager,
    fused,
    run,
    to,
    use_small_tiles,
)


@pytest.fixture(autouse=True, params=["chunked", "low_memory"])
def small_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_small_tiles(request.param):
        yield request.param


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"entropy_coef": 0.3},
    "kl": {"kl_coef": 0.2, "kl_estimator": "k3"},
    "dual": {"dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.4},
    "all": {"entropy_coef": 0.3, "kl_coef": 0.2, "kl_estimator": "k2", "dual_clip": 1.5, "normalizer": 7.5},
    "normalizer": {"normalizer": torch.tensor(40, dtype=torch.int64), "entropy_coef": -0.1},
}
TRAIN = [("hidden",), LEAVES, ("weight",), ("hidden", "bias")]


@pytest.mark.parametrize("train", TRAIN, ids="+".join)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_composition(dtype: torch.dtype, name: str, train: tuple[str, ...]) -> None:
    data, kw = batch(dtype), OPTIONS[name]
    truth, true_grads = run(eager, to(torch.float64, data), train, **kw)
    _, eager_grads = run(eager, data, train, **kw)
    parts, _ = run(composed, data, train, **kw)
    got, grads = run(fused, data, train, **kw)
    fp64 = dtype == torch.float64
    # log-probabilities to 1e-5 nat, ratios up to 3.4, advantages up to 3
    assert_within(got.loss, truth.loss, 1e-12 if fp64 else 1e-4, "loss")
    assert got.loss.dtype == parts.loss.dtype
    assert got.metrics.keys() == parts.metrics.keys()
    for key, value in parts.metrics.items():
        assert_within(got.metrics[key], value, 1e-12 if fp64 else 16 * EPS * max(1.0, float(value)), key)
        assert got.metrics[key].dtype == value.dtype
    for leaf, true in true_grads.items():
        assert grads[leaf].dtype == dtype
        if fp64:
            assert_within(grads[leaf], true, 1e-12, leaf)
        else:
            assert_like_eager(grads[leaf], eager_grads[leaf], true, leaf)


@pytest.mark.parametrize("train", [("hidden",), LEAVES], ids=["frozen", "trained"])
@needs_triton
@chunked_only
def test_triton_s_terms_in_the_same_sweep(small_tiles: str, train: tuple[str, ...]) -> None:
    data, kw = batch(), OPTIONS["all"]
    truth, true_grads = run(eager, to(torch.float64, data), train, **kw)
    _, eager_grads = run(eager, data, train, **kw)
    with tuning.override(implementation="chunked", rows=16):
        got, grads = run(fused, data, train, **kw, backend="triton")
    assert_within(got.loss, truth.loss, 1e-4)
    for key, value in truth.metrics.items():
        assert_within(got.metrics[key], value, 1e-4, key)
    for leaf, true in true_grads.items():
        assert_like_eager(grads[leaf], eager_grads[leaf], true, leaf)


def test_fp16_gradients_are_divided_before_they_are_rounded() -> None:
    """The sum over tokens is past fp16's 65504, the mean is not; and the other way with a small normalizer."""
    n = 64
    hidden = torch.full((n, D), 40.0, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(V, D, dtype=torch.float16).requires_grad_()
    targets, advantages = torch.full((n,), 3), torch.full((n,), 60.0)
    logp = torch.full((n,), -torch.log(torch.tensor(float(V))))
    rest = (targets, logp, advantages, torch.ones(n))
    policy = linear_logprobs(hidden, weight, targets)
    expected = torch.autograd.grad(ppo_loss(policy.logprobs, *rest[1:]).loss, weight)[0]
    got = torch.autograd.grad(linear_ppo_loss(hidden, weight, *rest).loss, weight)[0]
    assert expected.isfinite().all()
    assert_within(got, expected, 2 * torch.finfo(torch.float16).eps * float(expected.abs().max()))


def test_fp16_gradients_under_a_scaled_loss() -> None:
    """A grad scaler multiplies the loss: gradients below fp16's least number without it are not lost."""
    data = batch(torch.float16)
    data["advantages"] = data["advantages"] * 1e-6
    _, true_grads = run(eager, to(torch.float64, data), LEAVES)
    data = {**data, **{name: data[name].detach().clone().requires_grad_() for name in LEAVES}}
    for fn in (composed, fused):
        grads = torch.autograd.grad(fn(data).loss * 2.0**16, [data[name] for name in LEAVES])
        for mine, (name, true) in zip(grads, true_grads.items(), strict=True):
            tolerance = 4 * torch.finfo(torch.float16).eps * float(true.abs().max()) * 2.0**16
            assert_within(mine, true * 2.0**16, tolerance, f"{fn.__name__}, {name}")
