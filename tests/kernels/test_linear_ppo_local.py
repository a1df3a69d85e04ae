"""linear_ppo_loss forms its gradients in its forward: that they are those of the two functions it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard_kernels import dispatch, launch, linear_logprobs, linear_ppo_loss, ppo_loss
from onecard_kernels.logprob import plans, products, reference
from onecard_kernels.ppo import reference as formulas
from onecard_kernels.ppo.terms import SUMS
from tests.closeness import assert_like_eager, assert_within

N, D, V = 24, 8, 131
NAN, INF = float("nan"), float("inf")
EPS = torch.finfo(torch.float32).eps
RUNS = launch.why_not(torch.device("cpu")) is None
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not RUNS, reason="triton does not run here"))]
HEAD: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0, "forbidden": torch.arange(V) == 0}


@pytest.fixture(autouse=True, params=["chunked", "low_memory"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("onecard_kernels.logprob.passes.BLOCK_BYTES", 3 * 40 * 4)
    with plans.override(implementation=request.param, rows=7, columns=40):
        yield request.param


chunked_alone = pytest.mark.parametrize("small_tiles", ["chunked"], indirect=True)


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Log-ratios away from the kinks by more than a half-precision head moves them; masked tokens hold NaN."""
    mask = torch.arange(N) % 5 != 3
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) * 0.5, torch.randn(V) * 0.3
    targets = torch.randint(1, V, (N,)).masked_fill(~mask, -100)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    logp = reference.linear_logprobs(
        hidden.double(), weight.double(), targets, bias=bias.double(), mask=mask, **HEAD
    ).logprobs
    d = torch.tensor([-0.6, -0.05, 0.04, 0.09, 0.5, 1.2]).double()[torch.arange(N) % 6]
    junk = torch.where(mask, 0.0, NAN)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": targets,
        "old_logprobs": (logp - d + junk).to(out),
        "advantages": (torch.randn(N) + junk).to(out),
        "mask": mask,
        "ref_logprobs": (logp - torch.randn(N) + junk).to(out),
        "weights": (torch.rand(N) + junk).to(out),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"entropy_coef": 0.3},
    "kl": {"kl_coef": 0.2, "kl_estimator": "k3"},
    "dual": {"dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.4},
    "all": {"entropy_coef": 0.3, "kl_coef": 0.2, "kl_estimator": "k2", "dual_clip": 1.5, "normalizer": 7.5},
    "normalizer": {"normalizer": torch.tensor(40, dtype=torch.int64), "entropy_coef": -0.1},
}
LEAVES = ("hidden", "weight", "bias")


def composed(data: dict[str, Any], lp: Any = linear_logprobs, **kw: Any) -> Any:
    """The two public functions, one after the other."""
    names = ("hidden", "weight", "targets")
    mask, entropy_coef = data["mask"], kw.get("entropy_coef", 0.0)
    policy = lp(
        *(data[name] for name in names),
        **{"bias": data["bias"], "mask": mask, **HEAD},
        return_entropy=True,
        entropy_requires_grad=entropy_coef != 0.0,
    )
    rest = (data["old_logprobs"], data["advantages"], mask)
    more = {name: data[name] for name in ("ref_logprobs", "weights")}
    return ppo_loss(policy.logprobs, *rest, entropy=policy.entropy, **more, **kw)


def local(data: dict[str, Any], **kw: Any) -> Any:
    return linear_ppo_loss(**data, **HEAD, **kw)


def run(fn: Any, data: dict[str, Tensor], train: tuple[str, ...], **kw: Any) -> tuple[Any, dict[str, Tensor]]:
    data = {**data, **{name: data[name].detach().clone() for name in LEAVES}}
    leaves = [data[name].requires_grad_() for name in train]
    out = fn(data, **kw)
    return out, dict(zip(train, torch.autograd.grad(out.loss, leaves), strict=True))


def to(dtype: torch.dtype, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}


def eager(data: dict[str, Any], **kw: Any) -> Any:
    return composed(data, lp=reference.linear_logprobs, **kw)


TRAIN = [("hidden",), LEAVES, ("weight",), ("hidden", "bias")]


@pytest.mark.parametrize("train", TRAIN, ids="+".join)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_composition(dtype: torch.dtype, name: str, train: tuple[str, ...]) -> None:
    data, kw = batch(dtype), OPTIONS[name]
    truth, true_grads = run(eager, to(torch.float64, data), train, **kw)
    _, eager_grads = run(eager, data, train, **kw)
    parts, _ = run(composed, data, train, **kw)
    got, grads = run(local, data, train, **kw)
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
@pytest.mark.skipif(not RUNS, reason="triton does not run here")
@chunked_alone
def test_triton_s_terms_in_the_same_sweep(small_tiles: str, train: tuple[str, ...]) -> None:
    data, kw = batch(), OPTIONS["all"]
    truth, true_grads = run(eager, to(torch.float64, data), train, **kw)
    _, eager_grads = run(eager, data, train, **kw)
    with plans.override(implementation="chunked", rows=16):
        got, grads = run(local, data, train, **kw, backend="triton")
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
    for fn in (composed, local):
        grads = torch.autograd.grad(fn(data).loss * 2.0**16, [data[name] for name in LEAVES])
        for mine, (name, true) in zip(grads, true_grads.items(), strict=True):
            bar = 4 * torch.finfo(torch.float16).eps * float(true.abs().max()) * 2.0**16
            assert_within(mine, true * 2.0**16, bar, f"{fn.__name__}, {name}")


# ---------------------------------------------------------------------------------------------------------------------
# products with the head


def spy_on(name: str, calls: list[tuple[str, int]]) -> Any:
    original = getattr(products, name)

    def spy(first: Tensor, *rest: Any) -> Any:
        calls.append((name, first.shape[0]))
        return original(first, *rest)

    return spy


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(which product, its rows) of every product with the head."""
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("project", "back", "outer"):
            patch.setattr(products, name, spy_on(name, calls))
        yield calls


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ((), ["project"]),
        (("hidden",), ["project", "back"]),
        (("hidden", "weight"), ["project", "back", "outer"]),
        (("weight",), ["project", "outer"]),
        (LEAVES, ["project", "back", "outer"]),
        (("bias",), ["project"]),
    ],
)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@chunked_alone
def test_number_of_products(small_tiles: str, train: tuple[str, ...], names: list[str], entropy_coef: float) -> None:
    """Two with a frozen head, three with a trained one, with the entropy bonus in them; none in the backward."""
    data = batch()
    for name in train:
        data[name].requires_grad_()
    valid = int(data["mask"].sum())
    with plans.override(implementation="chunked", rows=1000):
        with counted() as forward:
            loss = local(data, entropy_coef=entropy_coef).loss
        assert [name for name, _ in forward] == names
        assert forward[0] == ("project", valid)
        with counted() as backward:
            if train:
                loss.backward()
        assert backward == []
        with counted() as silent, torch.no_grad():
            local(data, entropy_coef=entropy_coef)
        assert silent == [("project", valid)]


def test_low_memory_adds_one_product_for_the_entropy() -> None:
    data = batch()
    data["hidden"].requires_grad_()
    for entropy_coef, names in ((0.0, ["project", "back"]), (0.3, ["project", "back", "back"])):
        with plans.override(implementation="low_memory", rows=19, columns=66), counted() as calls:
            local(data, entropy_coef=entropy_coef)
        assert [name for name, _ in calls] == names * 2  # two tiles


def clipped_batch(clipped: int, tokens: int = 32) -> dict[str, Tensor]:
    """The first ones have a ratio of 2 and a positive advantage: no gradient. They are mixed with the others."""
    hidden, weight, targets = torch.randn(tokens, D), torch.randn(V, D) * 0.5, torch.randint(1, V, (tokens,))
    idle = torch.zeros(tokens, dtype=torch.bool)
    idle[torch.randperm(tokens)[:clipped]] = True
    logp = linear_logprobs(hidden, weight, targets, **HEAD).logprobs
    old = logp - torch.where(idle, 0.7, 0.05)
    advantages = torch.rand(tokens) + 0.5
    return {"hidden": hidden, "weight": weight, "targets": targets, "old_logprobs": old, "advantages": advantages}


@pytest.mark.parametrize(
    ("clipped", "rows"),
    [
        (0, [32]),
        (1, [32]),
        (3, [32]),  # less than an eighth: moving rows would not pay
        (4, [28]),
        (16, [16]),
        (31, [1]),
        (32, []),
    ],
)
@pytest.mark.parametrize("entropy", [False, True])
@chunked_alone
def test_tokens_without_a_coefficient_skip_the_second_product(
    small_tiles: str, clipped: int, rows: list[int], entropy: bool
) -> None:
    """With an entropy bonus every token has a coefficient. The gradient is the same either way."""
    data = clipped_batch(clipped)
    kw = {**HEAD, "entropy_coef": 0.1 if entropy else 0.0, "backend": "torch"}
    ones = torch.ones(32)

    def go(worth: float) -> tuple[Tensor, list[int]]:
        leaf = data["hidden"].clone().requires_grad_()
        with plans.override(implementation="chunked", rows=1000), pytest.MonkeyPatch.context() as patch:
            patch.setattr("onecard_kernels.ppo.local.WORTH_SKIPPING", worth)
            with counted() as calls:
                loss = linear_ppo_loss(**{**data, "hidden": leaf}, mask=ones, **kw).loss
        return torch.autograd.grad(loss, leaf)[0], [n for name, n in calls if name == "back"]

    gradient, back = go(1 / 8)
    assert back == ([32] if entropy else rows)
    whole, _ = go(2.0)  # never worth it
    assert_within(gradient, whole, 4 * EPS * float(whole.abs().max()))
    mine, theirs = (x.abs().sum(1) == 0.0 for x in (gradient, whole))
    assert int(mine.sum()) == (0 if entropy else clipped)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("idle", "more", "rows"),
    [
        ("advantages", {}, 8),
        ("advantages", {"entropy_coef": 0.1}, 32),
        ("advantages", {"kl_coef": 0.1}, 32),
        ("weights", {}, 8),
        ("weights", {"entropy_coef": 0.1, "kl_coef": 0.1}, 8),
    ],
)
def test_tokens_without_advantage_or_weight_cost_one_product(
    small_tiles: str, idle: str, more: dict[str, Any], rows: int
) -> None:
    """They are known before: whatever the plan, their rows take part in the first product alone."""
    data = clipped_batch(0)
    quiet = torch.ones(32, dtype=torch.bool)
    quiet[torch.randperm(32)[:8]] = False
    data["weights"] = torch.rand(32) + 0.5
    data["ref_logprobs"] = data["old_logprobs"] - 0.3
    data[idle] = data[idle].masked_fill(quiet, 0.0)
    leaf = data["hidden"].clone().requires_grad_()
    with counted() as calls:
        got = linear_ppo_loss(**{**data, "hidden": leaf}, mask=torch.ones(32), **HEAD, **more)
    tiles = 1 if small_tiles == "chunked" else 4  # 131 columns by 40
    back = sum(n for name, n in calls if name == "back")
    assert back == rows * tiles * (2 if small_tiles == "low_memory" and "entropy_coef" in more else 1)
    assert sum(n for name, n in calls if name == "project") == 32 * tiles
    gradient = torch.autograd.grad(got.loss, leaf)[0]
    policy = linear_logprobs(leaf, data["weight"], data["targets"], entropy_requires_grad=True, **HEAD)
    rest = {n: data[n] for n in ("old_logprobs", "advantages", "weights", "ref_logprobs")}
    whole = ppo_loss(policy.logprobs, **rest, mask=torch.ones(32), entropy=policy.entropy, **more)
    assert_within(got.loss, whole.loss, 16 * EPS * max(1.0, abs(float(whole.loss.detach()))))
    for key, value in whole.metrics.items():
        assert_within(got.metrics[key], value, 16 * EPS * max(1.0, abs(float(value))), key)
    expected = torch.autograd.grad(whole.loss, leaf)[0]
    assert_within(gradient, expected, 16 * EPS * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@chunked_alone
def test_moved_rows_over_several_chunks_and_blocks(small_tiles: str, entropy_coef: float) -> None:
    """Chunks that are idle, half idle and busy; blocks of three rows inside each; some tokens masked."""
    data = clipped_batch(20, 40)
    data["mask"] = torch.arange(40) % 7 != 2
    data["weights"] = torch.where(torch.arange(40) % 3 == 0, 0.0, 1.0)  # idle for the entropy bonus too
    leaves = {**data, "hidden": data["hidden"].clone().requires_grad_()}
    got = torch.autograd.grad(linear_ppo_loss(**leaves, **HEAD, entropy_coef=entropy_coef).loss, leaves["hidden"])[0]
    policy = reference.linear_logprobs(
        leaves["hidden"].double(), data["weight"].double(), data["targets"], entropy_requires_grad=True, **HEAD
    )
    rest = (data["old_logprobs"], data["advantages"], data["mask"])
    loss = ppo_loss(
        policy.logprobs, *rest, entropy=policy.entropy, entropy_coef=entropy_coef, weights=data["weights"]
    ).loss
    truth = torch.autograd.grad(loss, leaves["hidden"])[0]
    assert_within(got, truth, 2e-6 * max(1.0, float(truth.abs().max())))


def test_no_valid_token_and_no_token() -> None:
    for n in (0, 5):
        hidden, weight = torch.randn(n, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        tokens = (torch.zeros(n, dtype=torch.long), torch.zeros(n), torch.zeros(n), torch.zeros(n))
        out = linear_ppo_loss(hidden, weight, *tokens, entropy_coef=0.1)
        assert out.loss == 0.0
        assert all(value == 0.0 for value in out.metrics.values())
        by_hidden, by_weight = torch.autograd.grad(out.loss, (hidden, weight))
        assert torch.equal(by_hidden, torch.zeros(n, D))
        assert torch.equal(by_weight, torch.zeros(V, D))


# ---------------------------------------------------------------------------------------------------------------------
# the derivatives that are written out

BORDERS: dict[str, tuple[float, float]] = {  # log-ratio, advantage
    "no advantage": (0.5, 0.0),
    "no advantage, clipped": (-0.9, 0.0),
    "ratio of one": (0.0, 1.0),
    "far above": (25.0, -1.0),
    "far below": (-25.0, 1.0),
    "at the limit": (20.0, -1.0),
    "at the other limit": (-20.0, 1.0),
    "beyond fp32": (200.0, -1.0),
    "beyond fp32, below": (-200.0, 1.0),
}


def terms_of(backend: str) -> Any:
    return dispatch.implementation("ppo_terms", backend, torch.device("cpu"))


def by_autograd(values: dict[str, Any], **kw: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sums and derivatives of the formula, in SUMS' order."""
    logp, mask = values["logprobs"].detach().clone().requires_grad_(), torch.ones_like(values["logprobs"]).bool()
    entropy = values["entropy"]
    entropy = None if entropy is None else entropy.detach().clone().requires_grad_()
    loss = formulas.ppo_loss(**{**values, "logprobs": logp, "entropy": entropy}, mask=mask, normalizer=1.0, **kw)
    leaves = [x for x in (logp, entropy) if x is not None]
    grads = torch.autograd.grad(loss.loss, leaves, allow_unused=True)
    sums = [loss.loss.detach(), *(loss.metrics.get(name, torch.zeros_like(loss.loss)) for name in SUMS[1:-1])]
    return torch.stack([*sums, mask.sum().to(logp.dtype)]), grads[0], grads[1] if len(grads) == 2 else None


def check_terms(values: dict[str, Any], backend: str, **kw: Any) -> None:
    mask = torch.ones_like(values["logprobs"]).bool()
    sums, slope, on_entropy = terms_of(backend)(**values, mask=mask, **kw)
    true_sums, true_slope, true_entropy = by_autograd(values, **kw)
    # a few roundings each of numbers of this size
    eps = torch.finfo(values["logprobs"].dtype).eps
    torch.testing.assert_close(sums, true_sums, rtol=16 * eps, atol=16 * eps)
    torch.testing.assert_close(slope, true_slope, rtol=16 * eps, atol=16 * eps)
    if kw["entropy_coef"] != 0.0:
        torch.testing.assert_close(on_entropy, true_entropy, rtol=4 * eps, atol=0.0)
    else:
        assert on_entropy is None


TERMS: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("estimator", "dual", "entropy_coef"), [("k1", None, 0.2), ("k2", 1.3, 0.0), ("k3", None, 0.0), ("k3", 1.3, 0.2)]
)
@chunked_alone
def test_terms_at_random_points(
    small_tiles: str, backend: str, dtype: torch.dtype, estimator: str, dual: float | None, entropy_coef: float
) -> None:
    n = 200
    logp = -3 * torch.rand(n, dtype=dtype)
    values = {
        "logprobs": logp,
        "old_logprobs": logp - 0.5 * torch.randn(n, dtype=dtype),
        "advantages": torch.randn(n, dtype=dtype),
        "entropy": torch.rand(n, dtype=dtype) if entropy_coef else None,
        "ref_logprobs": logp - torch.randn(n, dtype=dtype),
        "weights": torch.rand(n, dtype=dtype),
    }
    kw = {**TERMS, "dual_clip": dual, "kl_estimator": estimator, "kl_coef": 0.3, "entropy_coef": entropy_coef}
    if dtype == torch.float32:  # sums of 200: compare token by token
        for i in range(0, n, 40 if backend == "triton" else 8):
            check_terms({k: x if x is None else x[i : i + 1] for k, x in values.items()}, backend, **kw)
    else:
        check_terms(values, backend, **kw)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dual", [None, 3.0])
@chunked_alone
def test_terms_at_the_borders(small_tiles: str, backend: str, border: str, dual: float | None) -> None:
    d, advantage = BORDERS[border]
    logp = torch.tensor([-1.5], dtype=torch.float64)
    values = {
        "logprobs": logp,
        "old_logprobs": logp - d,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "entropy": None,
        "ref_logprobs": logp - d,
        "weights": None,
    }
    for kl_coef, estimator in ((0.0, "k3"), (0.1, "k3"), (0.1, "k2")):
        check_terms(values, backend, **{**TERMS, "dual_clip": dual, "kl_coef": kl_coef, "kl_estimator": estimator})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ratio", "advantage"), [(1.25, 1.0), (1.25, -1.0), (0.75, 1.0), (0.75, -1.0)])
@chunked_alone
def test_terms_on_the_border_of_the_clip_range(small_tiles: str, backend: str, ratio: float, advantage: float) -> None:
    """1 + 0.25 and 1 - 0.25 are exact; so is the ratio, as 0 - log of it is rounded the way exp undoes it."""
    old = -torch.tensor([ratio], dtype=torch.float64).log()
    assert torch.exp(-old) == ratio
    values: dict[str, Any] = {
        "logprobs": torch.zeros(1, dtype=torch.float64),
        "old_logprobs": old,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "entropy": None,
        "ref_logprobs": None,
        "weights": None,
    }
    kw = {**TERMS, "clip_low": 0.25, "clip_high": 0.25}
    check_terms(values, backend, **kw)
    sums, slope, _ = terms_of(backend)(**values, mask=torch.ones(1).bool(), **kw)
    assert sums[2] == 0.0  # not clipped: the border is inside
    torch.testing.assert_close(slope, -values["advantages"] * ratio, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("logp", "old", "ref"), [(-INF, -INF, -INF), (-INF, -1.0, -2.0), (-1.0, -INF, -1.5), (-1.0, -2.0, -INF)]
)
@chunked_alone
def test_terms_of_impossible_tokens(small_tiles: str, backend: str, logp: float, old: float, ref: float) -> None:
    """As one token among others; the slope of an impossible one is zero, never NaN."""

    def column(first: float) -> Tensor:
        return torch.tensor([first, -1.0], dtype=torch.float64)

    values: dict[str, Any] = {
        "logprobs": column(logp),
        "old_logprobs": column(old),
        "advantages": torch.tensor([0.7, -0.4], dtype=torch.float64),
        "entropy": None,
        "ref_logprobs": column(ref),
        "weights": None,
    }
    for estimator in ("k3",):
        kw = {**TERMS, "kl_coef": 0.1, "kl_estimator": estimator}
        check_terms(values, backend, **kw)
        _, slope, _ = terms_of(backend)(**values, mask=torch.ones(2).bool(), **kw)
        assert slope.isfinite().all()
        if logp == -INF:
            assert slope[0] == 0.0
