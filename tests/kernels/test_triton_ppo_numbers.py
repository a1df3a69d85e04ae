"""ppo_loss and value_loss on Triton: the reference's values and gradients, at borders, ties and extremes too."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from onecard_kernels import ppo_loss, value_loss
from tests.closeness import assert_within
from tests.kernels.triton_ppo_material import (
    DEVICE,
    INF,
    NAN,
    OPTIONS,
    compare,
    masks,
    one,
    run,
    run_policy,
    run_value,
    tokens,
    values,
)

pytest.importorskip("triton")

BOTH = ("torch", "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_policy_is_the_reference(name: str, dtype: torch.dtype) -> None:
    off, options = OPTIONS[name].get("off", ()), {k: v for k, v in OPTIONS[name].items() if k != "off"}
    leaves = ("logprobs",) if "entropy" in off else ("logprobs", "entropy")
    compare(ppo_loss, leaves, tokens((5, 13), dtype, off), mask=masks((5, 13))["holes"], **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"clip": None}, {"clip": 0.7, "normalizer": 11}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_is_the_reference(options: dict[str, Any], weighted: bool, dtype: torch.dtype) -> None:
    compare(value_loss, ("values",), values((5, 13), dtype, weighted), mask=masks((5, 13))["holes"], **options)


@pytest.mark.parametrize("mask", ["all", "none", "holes", "leading", "trailing", "rows"])
def test_masked_tokens_may_hold_anything(mask: str) -> None:
    """Without a trace in loss, metrics and gradient, which is 0 there."""
    valid = masks((3, 9))[mask]
    batches = {"policy": tokens((3, 9), torch.float32), "value": values((3, 9), torch.float32)}
    for kind, run_, options in (("policy", run_policy, OPTIONS["all"]), ("value", run_value, {})):
        clean = run_(batches[kind], mask=valid, backend="triton", **options)
        compare(
            *((ppo_loss, ("logprobs", "entropy")) if kind == "policy" else (value_loss, ("values",))),
            batches[kind],
            mask=valid,
            **options,
        )
        junk = torch.tensor([NAN, INF, -INF], device=DEVICE).repeat(9).view(3, 9)
        dirty = {name: torch.where(valid == 0, junk.roll(i), x) for i, (name, x) in enumerate(batches[kind].items())}
        got = run_(dirty, mask=valid, backend="triton", **options)
        assert all(torch.equal(got[name], clean[name]) for name in clean)
        grads = [x for name, x in got.items() if x.dim()]
        assert all(torch.equal(g[valid == 0], torch.zeros_like(g[valid == 0])) for g in grads)


NORMALIZERS = [None, 3, 2.5, torch.tensor(3), torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64)]


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_normalizers(normalizer: Any) -> None:
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(DEVICE)
    mask = masks((2, 5))["holes"]
    for dtype in (torch.float32, torch.float64):
        compare(ppo_loss, ("logprobs",), tokens((2, 5), dtype), mask=mask, normalizer=normalizer)
        compare(value_loss, ("values",), values((2, 5), dtype), mask=mask, normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BOTH)
def test_the_border_of_the_range_is_inside(backend: str, dtype: torch.dtype) -> None:
    """1 + clip_high is the ratio itself, then the number below it; so with 1 - clip_low. Both are exact."""
    for d, advantage, option in ((0.25, 2.0, "clip_high"), (-0.25, -2.0, "clip_low")):
        batch = {"logprobs": one(d - 1, dtype), "old_logprobs": one(-1.0, dtype), "advantages": one(advantage, dtype)}
        loss = functools.partial(run, ppo_loss, ("logprobs",), batch, mask=one(1.0), backend=backend)
        ratio = loss()["val/ratio"]
        there = abs(ratio.item() - 1.0)
        inside = loss(**{option: there})
        assert inside["dlogprobs"].item() == -advantage * ratio.item()
        assert inside["policy/clipfrac"].item() == 0.0
        nearer = torch.nextafter(ratio, torch.ones_like(ratio)).item()
        outside = loss(**{option: abs(nearer - 1.0)})
        assert outside["dlogprobs"].item() == 0.0
        assert outside["policy/clipfrac"].item() == 1.0


# In fp32 1 - c (1 + c) is another number if c is rounded before, on the side that cuts the true border off.
ROUNDED_TWICE = [
    ("clip_low", -1.0, (0.058, 0.109, 0.132, 0.137, 0.16, 0.183)),
    ("clip_high", 1.0, (0.116, 0.139, 0.195, 0.218, 0.241, 0.251)),
]


@pytest.mark.parametrize(("option", "sign", "widths"), ROUNDED_TWICE)
@pytest.mark.parametrize("backend", BOTH)
def test_the_border_is_rounded_once(backend: str, option: str, sign: float, widths: tuple[float, ...]) -> None:
    reached = 0
    for width in widths:
        exact = torch.tensor(1.0 + sign * width, dtype=torch.float32, device=DEVICE)
        near = math.log(1.0 + sign * width) + 1e-8 * torch.arange(-20, 21, dtype=torch.float64)
        batch = {"logprobs": near.float().to(DEVICE), "advantages": torch.full((41,), sign, device=DEVICE)}
        batch["old_logprobs"] = torch.zeros_like(batch["logprobs"])
        loss = functools.partial(run, ppo_loss, ("logprobs",), batch, mask=torch.ones_like(batch["logprobs"]))
        ratios = -sign * loss(clip_low=1.0, clip_high=9.0, normalizer=1.0, backend=backend)["dlogprobs"]
        inside = ratios >= exact if sign < 0 else ratios <= exact
        got = loss(**{option: width}, normalizer=1.0, backend=backend)["dlogprobs"]
        assert torch.equal(got, torch.where(inside, -sign * ratios, 0.0))
        reached += int((ratios == exact).any())
    assert reached


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BOTH)
def test_ties_are_shared_as_torch_shares_them(backend: str, dtype: torch.dtype) -> None:
    """Where dual_clip is the ratio, and where both errors of the value are 3/4: half the gradient each."""
    batch = {"logprobs": one(0.5, dtype), "old_logprobs": one(-0.5, dtype), "advantages": one(-2.0, dtype)}
    loss = functools.partial(run, ppo_loss, ("logprobs",), batch, mask=one(1.0), backend=backend)
    ratio = loss()["val/ratio"].item()
    assert loss(dual_clip=ratio)["dlogprobs"].item() == ratio  # half of -A ratio
    assert loss(dual_clip=ratio * 1.01)["dlogprobs"].item() == 2.0 * ratio
    batch = {"values": one(2.0, dtype), "old_values": one(0.0, dtype), "returns": one(1.25, dtype)}
    got = run_value(batch, mask=one(1.0), clip=0.5, backend=backend)
    assert got["loss"].item() == 0.75**2 / 2
    assert got["dvalues"].item() == 0.75 / 2
    assert got["val/clipfrac"].item() == 0.0
    # v on the border of its range, and no advantage at all
    batch |= {"values": one(0.5, dtype)}
    assert run_value(batch, mask=one(1.0), clip=0.5, backend=backend)["dvalues"].item() == -0.75
    nothing = {"logprobs": one(0.5, dtype), "old_logprobs": one(-0.5, dtype), "advantages": one(0.0, dtype)}
    got = run(ppo_loss, ("logprobs",), nothing, mask=one(1.0), backend=backend)
    assert got["dlogprobs"].item() == got["policy/clipfrac"].item() == got["loss"].item() == 0.0


@pytest.mark.parametrize("d", [200.0, -200.0, 20.5, -20.5, 19.5, -19.5, INF, -INF, 0.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extremes(d: float, advantage: float) -> None:
    """Log-ratios of +-200 and infinite ones, towards the old policy and the reference, in k3 and with dual_clip."""
    x, base = (-1.0, -1.0 - d) if d > 0 else (d - 1.0, -1.0)
    batch = {"logprobs": one(x), "old_logprobs": one(base), "advantages": one(advantage), "ref_logprobs": one(base)}
    for options in ({"kl_coef": 1.0}, {"dual_clip": 3.0}, {"kl_estimator": "k1"}, {"kl_estimator": "k2"}):
        compare(ppo_loss, ("logprobs",), batch, mask=one(1.0), **options)
    far = run(ppo_loss, ("logprobs",), batch, mask=one(1.0), kl_coef=1.0, backend="triton")
    assert all(value.isfinite().all() for value in far.values())
    assert (far["dlogprobs"].item() == 0.0) == (abs(d) > 20)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("backend", BOTH)
def test_two_impossible_tokens_agree(backend: str, estimator: str) -> None:
    none = one(-INF)
    batch = {"logprobs": none, "old_logprobs": none, "advantages": one(2.0), "ref_logprobs": none}
    options = {"kl_coef": 1.0, "kl_estimator": estimator, "backend": backend}
    got = run(ppo_loss, ("logprobs",), batch, mask=one(1.0), **options)
    assert got["loss"].item() == -2.0  # ratio 1
    assert got["dlogprobs"].item() == got["policy/kl"].item() == got["policy/approxkl"].item() == 0.0
    assert got["val/ratio"].item() == 1.0


def test_terms_that_are_off_are_measured_only() -> None:
    batch = {"logprobs": one(-1.0), "old_logprobs": one(-1.0), "advantages": one(4.0)}
    batch |= {"entropy": one(INF), "ref_logprobs": one(-INF)}
    off = run_policy(batch, mask=one(1.0), kl_estimator="k1", backend="triton")
    assert off["loss"].item() == off["dlogprobs"].item() == -4.0
    assert off["dentropy"] is None
    assert off["policy/entropy"].item() == off["policy/kl"].item() == INF


def test_small_and_large_log_ratios_keep_their_digits() -> None:
    """The ratio to 4 ulps up to e^20, k3 and its derivative from 1e-6 on; d = logp - 0 is exact."""
    d = torch.cat([x * torch.logspace(-6, math.log10(19.99), 200) for x in (1.0, -1.0)]).to(DEVICE)
    ulp = 4 * torch.finfo(torch.float32).eps
    zero, ones = torch.zeros_like(d), torch.ones_like(d)
    given: dict[str, Any] = {"mask": ones, "clip_low": 1.0, "clip_high": 1e9, "normalizer": 1.0, "backend": "triton"}
    got = run(ppo_loss, ("logprobs",), {"logprobs": d, "old_logprobs": zero, "advantages": -ones}, **given)
    assert_within(got["dlogprobs"] / d.double().exp(), torch.ones_like(d), ulp, "ratio")
    batch = {"logprobs": d, "old_logprobs": d, "advantages": zero, "ref_logprobs": zero}
    got = run(ppo_loss, ("logprobs",), batch, kl_coef=1.0, **given)
    assert_within(got["dlogprobs"] / -torch.expm1(-d.double()), torch.ones_like(d), ulp, "slope of k3")
    for i in range(0, 400, 37):
        piece = {name: x[i : i + 1] for name, x in batch.items()}
        kl = ppo_loss(**piece, mask=ones[:1], backend="triton").metrics["policy/kl"]
        x = d[i].double()
        series = sum((-x) ** k / float(math.factorial(k)) for k in range(2, 80))
        assert_within(kl / series, torch.ones_like(kl), 2 * ulp, f"k3 at {x}")
