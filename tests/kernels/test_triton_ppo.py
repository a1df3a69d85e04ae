"""ppo_loss and value_loss on Triton: the reference's values, gradients and habits, from one launch each way."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from onecard_kernels import launch, ppo_loss, value_loss
from tests.closeness import FLOOR_ULPS, assert_like_eager, assert_within, error, floor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from onecard_kernels.ppo import launches, ops  # noqa: E402
from onecard_kernels.ppo.triton import token_terms  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
BOTH = ("torch", "triton")
OF_TOKENS = ("old_logprobs", "advantages", "entropy", "ref_logprobs", "weights")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"off": ("entropy", "ref_logprobs", "weights")},
    "weights": {"off": ("entropy", "ref_logprobs"), "clip_low": 0.1, "clip_high": 0.3},
    "dual": {"off": ("entropy", "ref_logprobs", "weights"), "dual_clip": 1.3},
    "measured": {"kl_estimator": "k2"},
    "k1": {"off": ("weights",), "kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"off": ("entropy",), "kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"off": ("entropy", "weights"), "kl_coef": 0.3},
    "all": {"entropy_coef": 0.2, "kl_coef": 0.3, "dual_clip": 1.5, "clip_low": 0.15, "normalizer": 7.3},
}


def one(x: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([x], dtype=dtype, device=DEVICE)


def tokens(shape: tuple[int, ...], dtype: torch.dtype, off: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Ratios on both sides of the range, advantages of both signs."""
    batch = {"logprobs": -torch.rand(shape) * 3}
    batch |= {name: batch["logprobs"] + 0.3 * torch.randn(shape) for name in ("old_logprobs", "ref_logprobs")}
    batch |= {"advantages": torch.randn(shape), "entropy": torch.rand(shape) * 5, "weights": torch.rand(shape) * 2}
    return {name: x.to(DEVICE, dtype) for name, x in batch.items() if name not in off}


def masks(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    t = torch.arange(shape[-1]).expand(shape)
    holes = torch.rand(shape) < 0.6
    rows = torch.zeros(shape, dtype=torch.bool)
    rows[::2] = True
    return {
        name: mask.to(DEVICE)
        for name, mask in {
            "all": torch.ones(shape),
            "none": torch.zeros(shape, dtype=torch.bool),
            "holes": holes,
            "leading": (t >= 3).long(),
            "trailing": (t < 2).float(),
            "rows": rows.to(torch.uint8),
        }.items()
    }


def run(function: Any, leaves: tuple[str, ...], batch: dict[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """Loss, metrics and gradients of the leaves, by name."""
    batch = {name: x.detach().requires_grad_(name in leaves) for name, x in batch.items()}
    got = function(**batch, **options)
    grads = torch.autograd.grad(got.loss, [batch[name] for name in leaves], allow_unused=True)
    return {"loss": got.loss, **got.metrics} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def magnitudes(function: Any, batch: dict[str, torch.Tensor], mask: torch.Tensor, **options: Any) -> dict[str, float]:
    """Sums of absolute values of what single tokens add to loss and metrics: the scale of a sum's rounding."""
    sums: dict[str, float] = {}
    for i in mask.flatten().nonzero().flatten().tolist():
        token = {name: x.flatten()[i : i + 1] for name, x in batch.items()}
        got = function(**token, mask=torch.ones_like(token[next(iter(token))]), backend="torch", **options)
        for name, x in {"loss": got.loss, **got.metrics}.items():
            sums[name] = sums.get(name, 0.0) + abs(x.item())
    return sums


def compare(
    function: Any, leaves: tuple[str, ...], batch: dict[str, torch.Tensor], mask: torch.Tensor, **options: Any
) -> None:
    """Against the fp64 reference on the same numbers, at most twice as wrong as the reference in the inputs' dtype."""
    wide = {name: x.double() for name, x in batch.items()}
    truth = run(function, leaves, wide, mask=mask, backend="torch", **options)
    eager = run(function, leaves, batch, mask=mask, backend="torch", **options)
    got = run(function, leaves, batch, mask=mask, backend="triton", **options)
    assert list(got) == list(eager)
    divisor = options.pop("normalizer", None) or max(1.0, float(mask.sum()))
    scales = magnitudes(function, wide, mask, normalizer=divisor, **options)
    for name, expected in truth.items():
        if expected is None:
            assert got[name] is None, name
            continue
        assert got[name].dtype == eager[name].dtype, name
        assert got[name].shape == eager[name].shape, name
        if name in scales and math.isfinite(scales[name]):
            bar = 2.0 * error(eager[name], expected) + FLOOR_ULPS * torch.finfo(got[name].dtype).eps * scales[name]
            assert_within(got[name], expected, max(bar, floor(expected, got[name].dtype)), name)
        else:
            assert_like_eager(got[name], eager[name], expected, name)


run_policy = functools.partial(run, ppo_loss, ("logprobs", "entropy"))
run_value = functools.partial(run, value_loss, ("values",))


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


def values(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool = True) -> dict[str, torch.Tensor]:
    old = torch.randn(shape)
    batch = {"values": old + 0.4 * torch.randn(shape), "old_values": old, "returns": torch.randn(shape)}
    batch |= {"weights": torch.rand(shape)} if weighted else {}
    return {name: x.to(DEVICE, dtype) for name, x in batch.items()}


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


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_shapes_of_no_token_and_of_one(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, device=DEVICE)
    compare(ppo_loss, ("logprobs", "entropy"), tokens(shape, torch.float32), mask=mask, entropy_coef=0.1)
    compare(value_loss, ("values",), values(shape, torch.float32), mask=mask)


def test_several_programs_and_turns_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """327 tokens: 11 programs of 32, added up 4 at a time."""
    monkeypatch.setattr(launches, "BLOCK", 32)
    monkeypatch.setattr(launches, "COLUMNS", 4)
    mask = torch.rand(3, 109, device=DEVICE) < 0.7
    for dtype in (torch.float32, torch.float64):
        options = {k: v for k, v in OPTIONS["all"].items() if k != "normalizer"}
        compare(ppo_loss, ("logprobs", "entropy"), tokens((3, 109), dtype), mask=mask, **options)
        compare(value_loss, ("values",), values((3, 109), dtype), mask=mask)


def scattered(x: torch.Tensor, i: int) -> torch.Tensor:
    """The same numbers under other strides: transposed, every second one, or a row apart."""
    if i % 3 == 0:
        return x.t().contiguous().t()
    wide = torch.full((x.shape[0], 2 * x.shape[1]), NAN, dtype=x.dtype, device=x.device)
    view = wide[:, ::2] if i % 3 == 1 else wide[:, 1 : x.shape[1] + 1]
    return view.copy_(x)


def test_inputs_of_any_strides() -> None:
    mask = masks((4, 7))["holes"]
    for run_, batch in ((run_policy, tokens((4, 7), torch.float32)), (run_value, values((4, 7), torch.float32))):
        plain = run_(batch, mask=mask, backend="triton")
        strided = {name: scattered(x, i) for i, (name, x) in enumerate(batch.items())}
        got = run_(strided, mask=scattered(mask.float(), 1).bool().t().contiguous().t(), backend="triton")
        assert all(torch.equal(got[name], plain[name]) for name in plain if plain[name] is not None)
        rows = {name: x[:1].expand(4, 7) for name, x in batch.items()}
        repeated = {name: x.contiguous() for name, x in rows.items()}
        got, plain = (run_(b, mask=mask, backend="triton") for b in (rows, repeated))
        assert torch.equal(got["loss"], plain["loss"])


def test_backward_again_and_through_other_operations() -> None:
    batch = tokens((4, 6), torch.float32)
    logp, entropy = batch["logprobs"].requires_grad_(), batch["entropy"].requires_grad_()
    mask = torch.ones(4, 6, device=DEVICE)
    got = ppo_loss(**batch, mask=mask, entropy_coef=0.2, backend="triton")
    leaves = (logp, entropy)
    first = torch.autograd.grad(got.loss, leaves, retain_graph=True)
    for value in got.metrics.values():
        value.mul_(0.0)  # the metrics are the caller's
    second = torch.autograd.grad(got.loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    twice = torch.autograd.grad(got.loss * 3.0 + got.loss, leaves)
    torch.testing.assert_close(twice, tuple(4.0 * g for g in first))
    v = values((4, 6), torch.float32)
    v["values"].requires_grad_()
    loss = value_loss(**v, mask=mask, backend="triton").loss
    once = torch.autograd.grad(loss, v["values"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, v["values"], retain_graph=True)[0], once)
    torch.testing.assert_close(torch.autograd.grad(loss * -2.0, v["values"])[0], -2.0 * once)


def test_two_runs_agree_in_every_bit() -> None:
    batch, mask = tokens((3, 1000), torch.float32), torch.rand(3, 1000, device=DEVICE) < 0.9
    one_, two = (run_policy(batch, mask=mask, backend="triton", **OPTIONS["all"]) for _ in range(2))
    assert all(torch.equal(one_[name], two[name]) for name in one_)


def test_gradients_go_where_the_reference_s_go() -> None:
    batch = {name: x.requires_grad_() for name, x in tokens((6,), torch.float32).items()}
    normalizer = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    mask = torch.ones(6, device=DEVICE)
    got = ppo_loss(**batch, mask=mask, entropy_coef=0.1, normalizer=normalizer, backend="triton")
    grads = torch.autograd.grad(got.loss, [*batch.values(), normalizer], allow_unused=True)
    reached = {name for name, g in zip([*batch, "normalizer"], grads, strict=True) if g is not None}
    assert reached == {"logprobs", "entropy"}
    assert not any(value.requires_grad for value in got.metrics.values())
    frozen = {name: x.detach() for name, x in batch.items()}
    assert not ppo_loss(**frozen, mask=mask, backend="triton").loss.requires_grad
    only_entropy = {**frozen, "entropy": batch["entropy"]}
    got = ppo_loss(**only_entropy, mask=mask, entropy_coef=0.1, backend="triton")
    torch.testing.assert_close(torch.autograd.grad(got.loss, batch["entropy"])[0], -0.1 * frozen["weights"] / 6)
    v = {name: x.requires_grad_() for name, x in values((6,), torch.float32).items()}
    got = value_loss(**v, mask=mask, backend="triton")
    grads = torch.autograd.grad(got.loss, list(v.values()), allow_unused=True)
    assert [g is not None for g in grads] == [True, False, False, False]
    assert not got.metrics["val/clipfrac"].requires_grad


def test_mixed_dtypes() -> None:
    """Each gradient has the dtype of its input; one fp64 input makes all arithmetic fp64."""
    batch = tokens((2, 5), torch.float32)
    batch["logprobs"] = batch["logprobs"].bfloat16()
    mask = masks((2, 5))["holes"]
    compare(ppo_loss, ("logprobs", "entropy"), batch, mask=mask, entropy_coef=0.3)
    batch["entropy"] = batch["entropy"].half()
    batch["advantages"] = batch["advantages"].double()
    got = run_policy(batch, mask=mask, entropy_coef=0.3, backend="triton")
    assert [got[name].dtype for name in ("loss", "dlogprobs", "dentropy")] == [
        torch.float64,
        torch.bfloat16,
        torch.float16,
    ]


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward, one backward, also with the entropy's gradient; without a gradient its memory is not written."""
    count = []
    monkeypatch.setattr(launches, "launch", lambda *a, **kw: (count.append(kw), launch.launch(*a, **kw)))
    mask = torch.ones(4, device=DEVICE)
    batch = tokens((4,), torch.bfloat16)
    batch["logprobs"].requires_grad_()
    batch["entropy"].requires_grad_()
    loss = ppo_loss(**batch, mask=mask, entropy_coef=0.1, backend="triton").loss
    assert len(count) == 2
    loss.backward()
    assert len(count) == 3
    v = values((4,), torch.bfloat16)
    v["values"].requires_grad_()
    loss = value_loss(**v, mask=mask, backend="triton").loss
    assert len(count) == 5
    loss.backward()
    assert len(count) == 6
    with torch.no_grad():
        ppo_loss(**batch, mask=mask, entropy_coef=0.1, backend="triton")
    assert len(count) == 8
    assert count[0]["SLOPE"]
    assert count[0]["ENTROPY_SLOPE"]
    assert not count[6]["SLOPE"]
    assert not count[6]["ENTROPY_SLOPE"]


def test_real_sizes_are_recorded_without_a_card() -> None:
    """64 x 4096 tokens on `meta`: nothing is read back."""
    batch = {name: torch.empty(64, 4096, device="meta") for name in ("logprobs", *OF_TOKENS)}
    mask = torch.empty(64, 4096, device="meta", dtype=torch.bool)
    options = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "entropy_coef": 0.1, "kl_coef": 0.1}
    with launch.recording() as recorded:
        done = launches.policy_tokens(**batch, mask=mask, **options, kl_estimator="k3")
        finished = launches.finish(done.sums, None)
        launches.scale(finished.loss, finished.divisor, done.slope, done.entropy_slope, torch.bfloat16, torch.bfloat16)
    assert [r.grid for r in recorded] == [(256,), (1,), (256,)]
    assert recorded[0].constexprs["BLOCK"] == 1024


def test_terms_are_sums_of_the_reference() -> None:
    batch, mask = tokens((3, 7), torch.float64), masks((3, 7))["holes"]
    options = {k: v for k, v in OPTIONS["all"].items() if k != "normalizer"} | {"clip_high": 0.2, "kl_estimator": "k3"}
    truth = run_policy(batch, mask=mask, normalizer=1.0, backend="torch", **options)
    sums, slope, entropy_slope = launches.ppo_terms(**batch, mask=mask, **options)
    expected = torch.stack([*list(truth.values())[:6], mask.sum().double()])
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(slope, truth["dlogprobs"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy_slope, truth["dentropy"], rtol=1e-13, atol=1e-13)
    assert launches.ppo_terms(**batch, mask=mask, **{**options, "entropy_coef": 0.0})[2] is None


@triton.jit
def one_row_a_program(
    logp_ptr, old_ptr, adv_ptr, ref_ptr, mask_ptr, out_ptr, low: tl.float64, high: tl.float64, dual: tl.float64
):
    i = tl.program_id(0)
    logp, old = tl.load(logp_ptr + i), tl.load(old_ptr + i)
    loss, slope, approxkl, clipped, ratio, kl = token_terms(
        logp,
        old,
        tl.load(adv_ptr + i),
        tl.load(ref_ptr + i),
        tl.load(mask_ptr + i) != 0,
        low,
        high,
        dual,
        0.3,
        True,
        True,
        True,
        "k3",
    )
    n = tl.num_programs(0)
    tl.store(out_ptr + i, loss)
    tl.store(out_ptr + n + i, slope)
    tl.store(out_ptr + 2 * n + i, approxkl)
    tl.store(out_ptr + 3 * n + i, clipped)
    tl.store(out_ptr + 4 * n + i, ratio)
    tl.store(out_ptr + 5 * n + i, kl)


def test_token_terms_take_one_token_too() -> None:
    batch, mask = tokens((9,), torch.float64, ("weights", "entropy")), torch.arange(9, device=DEVICE) % 4 != 0
    batch = {name: x.masked_fill(~mask, NAN) for name, x in batch.items()}
    out = torch.empty(6, 9, dtype=torch.float64, device=DEVICE)
    tensors = [batch[name] for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs")]
    launch.launch(one_row_a_program, (9,), *tensors, mask.view(torch.uint8), out, 0.2, 0.3, 1.4)
    options = {"clip_high": 0.3, "dual_clip": 1.4, "kl_coef": 0.3, "normalizer": 1.0, "backend": "torch"}
    truth = run(ppo_loss, ("logprobs",), batch, mask=mask, **options)
    names = ("loss", "policy/approxkl", "policy/clipfrac", "val/ratio", "policy/kl")
    torch.testing.assert_close(out.sum(1)[[0, 2, 3, 4, 5]], torch.stack([truth[name] for name in names]))
    torch.testing.assert_close(out[1], truth["dlogprobs"])
    assert torch.equal(out[:, ~mask], torch.zeros(6, 3, dtype=torch.float64, device=DEVICE))


def test_operators() -> None:
    batch, mask = tokens((2, 5), torch.float32), torch.ones(2, 5, device=DEVICE)
    leaves = [batch[name].detach().requires_grad_() for name in ("logprobs", "entropy")]
    given = [batch["old_logprobs"], batch["advantages"], mask]
    options = (None, None, 0.2, 0.3, None, 0.1, 0.2, "k3", True, True)
    torch.library.opcheck(
        ops._policy, (leaves[0], *given, leaves[1], batch["ref_logprobs"], batch["weights"], *options)
    )
    options = (torch.tensor(3, device=DEVICE), None, 0.2, 0.3, 2.0, 0.0, 0.0, "k1", False, False)
    torch.library.opcheck(ops._policy, (batch["logprobs"].half(), *given, None, None, None, *options))
    v = values((2, 5), torch.bfloat16)
    old = (v["old_values"], v["returns"], mask)
    torch.library.opcheck(ops._value, (v["values"].requires_grad_(), *old, v["weights"], None, None, 0.2, True))
    torch.library.opcheck(ops._value, (v["values"].detach(), *old, None, None, 2.0, None, False))
    grad, slope = torch.ones(2, device=DEVICE), torch.rand(2, 5, device=DEVICE)
    torch.library.opcheck(ops._scale, (grad[0], grad[1], slope, slope.new_empty(0), torch.bfloat16, torch.float32))
