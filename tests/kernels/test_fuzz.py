"""Any shape, layout, mask, dtype, option and plan: the references in fp64 say what is right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onecard_kernels import (
    dpo_loss,
    gae,
    launch,
    linear_kl,
    linear_logprobs,
    linear_ppo_loss,
    ppo_loss,
    selective_log_softmax,
    value_loss,
)
from onecard_kernels.advantages import reference as advantages
from onecard_kernels.kl.reference import token_kl
from onecard_kernels.logprob import plans, reference
from onecard_kernels.ppo import reference as formulas
from onecard_kernels.records import Head
from tests.closeness import FLOOR_ULPS, assert_within, error

RUNS = launch.why_not(torch.device("cpu")) is None
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not RUNS, reason="triton does not run here"))]
NAN = float("nan")
LEADING = st.lists(st.integers(0, 4), max_size=3).map(tuple)  # of tokens: 0-d to 3-d, none among them
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
draws = st.data()


def fuzz(examples: int) -> Any:
    """The same examples in every run. `seeded` and `nan_filled_empty` hold for all examples of a test alike."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes, and the first example found says enough
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def few(backend: str, examples: int, kernel: int) -> int:
    """Triton's interpreter takes milliseconds a program."""
    return kernel if backend == "triton" else examples


def layout(draw: Any, x: Tensor) -> Tensor:
    """The same values in other memory."""
    kind = draw(st.sampled_from(["as is", "transposed", "sliced", "strided", "offset", "expanded"]))
    if x.dim() == 0 or kind == "as is":
        return x
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        return torch.cat([x, x], dim=0).narrow(0, 0, x.shape[0])
    if kind == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if kind == "offset":
        return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
    return x[:1].expand_as(x) if x.shape[0] > 0 else x  # other values, in memory with stride 0


def mask_of(draw: Any, shape: tuple[int, ...]) -> Tensor | None:
    kind = draw(st.sampled_from(["none", "all", "nothing", "some", "few"]))
    if kind == "none":
        return None
    share = {"all": 1.0, "nothing": 0.0, "some": 0.6, "few": 0.15}[kind]
    mask = torch.rand(shape) < share
    return layout(draw, mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32]))))


def head_of(draw: Any, v: int, dtype: torch.dtype) -> dict[str, Any]:
    forbidden = torch.rand(v) < 0.3
    forbidden[draw(st.integers(0, v - 1))] = False
    return {
        "bias": draw(st.sampled_from([None, torch.randn(v).to(dtype)])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.0])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "forbidden": draw(st.sampled_from([None, forbidden])),
    }


def plan_of(draw: Any) -> Any:
    return plans.override(
        implementation=draw(st.sampled_from(plans.IMPLEMENTATIONS)),
        rows=draw(st.integers(1, 9)),
        columns=draw(st.integers(1, 40)),
    )


def seed(draw: Any) -> None:
    torch.manual_seed(draw(st.integers(0, 2**16)))


def double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x if name == "mask" else double(x) for name, x in options.items()}


def derive(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Zeros where nothing depends on a leaf, as with no valid token in a formula."""
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def assert_gradients(got: list[Tensor], eager: list[Tensor], truth: list[Tensor], terms: float) -> None:
    """`terms`: the size of what is summed to one entry. Eager can be exact by luck in so few tokens: besides twice its
    error, rounding each of those terms once or twice in fp32 is allowed for."""
    for mine, other, true in zip(got, eager, truth, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == true.shape
        inner = torch.float64 if mine.dtype == torch.float64 else torch.float32
        largest = float(true.abs().max()) if true.numel() else 0.0
        eager_off = 0.0 if inner == torch.float64 else error(other, true)
        bar = 2.0 * eager_off + FLOOR_ULPS * torch.finfo(mine.dtype).eps * largest
        assert_within(mine, true, bar + 16 * torch.finfo(inner).eps * terms, "gradient")


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

        truth, true_grads = run(reference.linear_logprobs, torch.float64)
        _, eager_grads = run(reference.linear_logprobs, None)
        with plan_of(draw):
            got, grads = run(linear_logprobs, None, backend=backend)
        largest = float((hidden.double() @ weight.double().T).abs().max()) if hidden.numel() else 0.0
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        # a few roundings of numbers as large as the largest logit; sums of up to 60 squares for the last
        bar = 16 * eps * (1 + largest * abs(head["logit_scale"]) + 4) / min(1.0, head["temperature"])
        for mine, true in zip(got, truth, strict=True):
            assert (mine is None) == (true is None)
            if true is not None:
                assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert_within(mine, true, bar)
        wide = max(1.0, largest) * max(
            1.0, float(weight.abs().max()), float(hidden.abs().max()) if hidden.numel() else 1.0
        )
        tokens = max(1, math.prod(shape)) if train else 1
        assert_gradients(grads, eager_grads, true_grads, 8 * wide * tokens)

    check()


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
    bar = 64 * eps * scale
    assert_within(got.loss, truth.loss, bar * max(1.0, abs(float(truth.loss.detach()))), "loss")
    for name, value in truth.metrics.items():
        assert_within(got.metrics[name], value, bar * max(1.0, abs(float(value))), name)


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
        logp = reference.linear_logprobs(hidden, weight, targets, **head).logprobs
        tokens, options = policy_of(draw, logp.masked_fill(logp.isinf(), -5.0), shape, mask)
        train = draw(st.booleans())

        def run(composed: bool) -> tuple[Any, list[Tensor]]:
            leaves = [x.detach().requires_grad_() for x in ((hidden, weight) if train else (hidden,))]
            given_ = (*leaves, *(() if train else (weight,)), targets)
            if not composed:
                loss = linear_ppo_loss(*given_, mask=mask, **tokens, **options, **head, backend=backend)
            else:
                policy = reference.linear_logprobs(*given_, mask=mask, **head, entropy_requires_grad=True)
                loss = formulas.ppo_loss(policy.logprobs, mask=mask, entropy=policy.entropy, **full(options, tokens))
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
        truth = formulas.ppo_loss(twins[0], mask=mask, entropy=twins[1], **kw)
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
        best = formulas.value_loss(twin, double(old + junk), double(returns + junk), mask, **doubled(more))
        near(fit, best, 1.0, eps)
        expected = derive(best.loss, [twin])[0]
        largest = float(expected.abs().max()) if values.numel() else 0.0
        assert_within(derive(fit.loss, [values])[0], expected, (torch.finfo(dtype).eps + 16 * eps) * max(largest, 1.0))

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

        truth, true_grads = run(reference.selective_log_softmax, torch.float64)
        _, eager_grads = run(reference.selective_log_softmax, dtype)
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
        truth = advantages.gae(rewards.double(), values.double(), mask, last_values=double(last), **kw)
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
