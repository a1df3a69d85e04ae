"""linear_kl: the exact divergence over the vocabulary from hidden states, as a function of its public arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onecard_kernels import linear_kl, linear_logprobs, token_kl
from onecard_kernels.kl import linear as source
from onecard_kernels.logprob import tuning
from onecard_kernels.records import Head
from tests.closeness import assert_like_eager, assert_within
from tests.kernels.backends import BACKENDS

B, T, D, V = 2, 5, 8, 131  # 131: prime, no chunk or block divides it
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("onecard_kernels.logprob.rows.BLOCK_BYTES", 2 * V * 4)
    with tuning.override(rows=6):  # three tokens of policy and reference each
        yield


def heads(kind: str) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {
        "plain": {},
        "bias": {"bias": torch.randn(V)},
        "temperature": {"temperature": 0.7},
        "scale": {"logit_scale": 0.25},
        "softcap": {"softcap": 3.0},
        "forbidden": {"forbidden": torch.arange(V) % 5 == 3},
        "another head": {"ref_weight": torch.randn(V, D)},
        "another bias": {"bias": torch.randn(V), "ref_bias": torch.randn(V)},
        "a reference's bias alone": {"ref_bias": torch.randn(V)},
        "another head, one bias": {"ref_weight": torch.randn(V, D), "bias": torch.randn(V)},
    }
    parts = ("temperature", "scale", "softcap", "forbidden", "another head", "another bias")
    table["all"] = {name: value for part in parts for name, value in table[part].items()}
    return table[kind]


KINDS = [
    *("plain", "bias", "temperature", "scale", "softcap", "forbidden", "another head", "another bias"),
    *("a reference's bias alone", "another head, one bias", "all"),
]


def eager(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    *,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    forbidden: Tensor | None = None,
    mask: Tensor | None = None,
    **numbers: Any,
) -> Tensor:
    """sum_v p_v (log p_v - log q_v), in the inputs' own dtype."""
    if ref_bias is None and ref_weight is None:
        ref_bias = bias
    z = Head(bias, **numbers).transform(hidden @ weight.T)
    r = Head(ref_bias, **numbers).transform(ref_hidden @ (weight if ref_weight is None else ref_weight).T)
    if forbidden is not None:
        z, r = z[..., ~forbidden], r[..., ~forbidden]
    logp, logq = z.log_softmax(-1), r.log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return kl if mask is None else torch.where(mask.bool(), kl, 0.0)


def to(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    return {
        n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and n != "mask" else x
        for n, x in options.items()
    }


def with_gradient(fn: Any, hidden: Tensor, *rest: Any, grad: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().clone().requires_grad_()
    kl = fn(leaf, *rest, **kw)
    return kl.detach(), torch.autograd.grad((kl * grad.to(kl)).sum(), leaf)[0]


def compare(dtype: torch.dtype, kind: str, backend: str, std: float = 2.0, **more: Any) -> None:
    # Tokens enough that eager's largest error is no matter of luck
    shape = more["mask"].shape if "mask" in more else (2, 16)
    hidden, ref, weight = (torch.randn(*x).to(dtype) for x in ((*shape, D), (*shape, D), (V, D)))
    weight, grad = weight * std / D**0.5, torch.randn(shape)
    options = to(dtype, heads(kind) | more)
    double = to(torch.float64, options)
    truth, true_grad = with_gradient(eager, hidden.double(), ref.double(), weight.double(), grad=grad, **double)
    _, plain_grad = with_gradient(eager, hidden, ref, weight, grad=grad, **options)
    got, mine = with_gradient(linear_kl, hidden, ref, weight, grad=grad, backend=backend, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mine.dtype == dtype
    if dtype == torch.float64:  # eager is the truth here
        assert_within(got, truth, 1e-13 * float(truth.max()))
        assert_within(mine, true_grad, 1e-13 * float(true_grad.abs().max()))
        return
    # in fp32 whatever the inputs are: what eager loses in the logits is not lost
    fp32, _ = with_gradient(eager, *(x.float() for x in (hidden, ref, weight)), grad=grad, **to(torch.float32, options))
    assert_like_eager(got, fp32, truth, "KL")
    assert_like_eager(mine, plain_grad, true_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_head(kind: str, backend: str) -> None:
    compare(torch.float32, kind, backend)


@pytest.mark.parametrize("kind", KINDS)
def test_fp64(kind: str) -> None:
    compare(torch.float64, kind, "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_low_precision(kind: str, dtype: torch.dtype, backend: str) -> None:
    compare(dtype, kind, backend, mask=torch.rand(4, 16) < 0.7)


def test_mixed_dtypes() -> None:
    """A reference in another precision, as a quantized one is: two products, each in what it is given."""
    hidden, ref, weight = torch.randn(T, D), torch.randn(T, D).bfloat16(), torch.randn(V, D).bfloat16()
    grad = torch.randn(T)
    args = (hidden.double(), ref.double(), weight.double())
    truth, true_grad = with_gradient(eager, *args, grad=grad)
    plain, plain_grad = with_gradient(eager, *(x.float() for x in args), grad=grad)
    got, mine = with_gradient(linear_kl, hidden, ref, weight, grad=grad)
    assert_like_eager(got, plain, truth)
    assert_like_eager(mine, plain_grad, true_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_between_equals_and_never_negative(backend: str) -> None:
    """A step from exact equality to one unit in the last place, and to far away."""
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D)
    same = linear_kl(hidden, hidden.detach(), weight, backend=backend)
    assert torch.equal(same, torch.zeros(T))
    same.sum().backward()
    # dKL/dz = p (d - KL), all of it rounding of d
    assert float(hidden.grad.abs().max()) <= 16 * torch.finfo(torch.float32).eps * float(weight.abs().max())
    for distance in (1e-7, 1e-5, 1e-3, 0.1, 10.0):
        moved = hidden.detach() + distance * torch.randn(T, D)
        assert (linear_kl(hidden.detach(), moved, weight, backend=backend) >= 0).all()


def test_near_the_reference_the_digits_are_kept() -> None:
    """KL is of second order: the plain sum in fp32 has no digit left at a distance of 1e-4."""
    hidden, weight = torch.randn(T, D), torch.randn(V, D)
    ref = hidden + 1e-3 * torch.randn(T, D)
    truth = eager(hidden.double(), ref.double(), weight.double())
    got = linear_kl(hidden, ref, weight)
    # d is known to 1 ulp of the logits (about 10), here 1e-3 of its size; the plain sum is off by 1e-6, as KL is
    assert float((got / truth - 1).abs().max()) < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_it_is_what_the_estimators_expect(estimator: str, backend: str) -> None:
    """sum_v p_v k(log p_v, log q_v) over all tokens; k1 and k3 are unbiased."""
    hidden, ref, weight = torch.randn(D), torch.randn(D), torch.randn(V, D) * 0.5
    options: dict[str, Any] = {"temperature": 1.3, "softcap": 4.0}
    every = torch.arange(V)
    logp, logq = (linear_logprobs(x.expand(V, D), weight, every, **options).logprobs.double() for x in (hidden, ref))
    expected = (logp.exp() * token_kl(logp, logq, estimator=estimator)).sum()
    assert_within(linear_kl(hidden, ref, weight, backend=backend, **options), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "int", "float"])
def test_masked_tokens_may_hold_anything(kind: str, backend: str) -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).to({"bool": torch.bool, "int": torch.int32}.get(kind))
    valid = mask.bool()
    hidden, ref, weight = torch.randn(B, T, D), torch.randn(B, T, D), torch.randn(V, D)
    grad = torch.randn(B, T)
    truth, true_grad = with_gradient(eager, hidden.double(), ref.double(), weight.double(), grad=grad, mask=mask)
    dirty, dirty_ref = (x.masked_fill(~valid.unsqueeze(-1), NAN) for x in (hidden, ref))
    dirty_grad = grad.masked_fill(~valid, NAN)
    leaf = dirty.requires_grad_()
    kl = linear_kl(leaf, dirty_ref, weight, mask=mask, backend=backend)
    mine = torch.autograd.grad(kl, leaf, dirty_grad)[0]
    assert torch.equal(kl[~valid], torch.zeros(int((~valid).sum())))
    assert torch.equal(mine[~valid], torch.zeros(int((~valid).sum()), D))
    assert_within(kl, truth, 1e-5)
    assert_within(mine, true_grad, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_divergence_has_no_gradient(backend: str) -> None:
    """`forbidden` is of both; only logits so far apart that q is 0 in the dtype make it infinite: log q = -inf."""
    hidden = torch.tensor([[1.0], [1.0], [0.5]], requires_grad=True)
    ref = torch.tensor([[1.0], [3e38], [0.25]])
    weight = torch.tensor([[0.0], [2.0], [-1.0]])  # 2 * 3e38 is inf in fp32, and inf - inf is NaN: kept below it
    weight = weight / 2
    kl = linear_kl(hidden, ref, weight, backend=backend)
    expected = eager(hidden.detach().double(), ref.double(), weight.double())
    assert_within(kl[[0, 2]], expected[[0, 2]], 1e-6)
    # -1.5e38 - 3e38 = -4.5e38: beyond fp32's end
    assert kl[1] == float("inf")
    kl.sum().backward()
    assert torch.equal(hidden.grad[1], torch.zeros(1))
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_but_one_token_forbidden(backend: str) -> None:
    hidden, ref, weight = torch.randn(3, D, requires_grad=True), torch.randn(3, D), torch.randn(V, D)
    kl = linear_kl(hidden, ref, weight, forbidden=torch.arange(V) != 7, backend=backend)
    assert torch.equal(kl, torch.zeros(3))
    kl.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(3, D))


@pytest.mark.parametrize("name", ["ref_hidden", "weight", "ref_weight", "bias", "ref_bias"])
def test_a_gradient_that_would_not_come_is_refused(name: str) -> None:
    given = {
        "hidden": torch.randn(T, D),
        "ref_hidden": torch.randn(T, D),
        "weight": torch.randn(V, D),
        "ref_weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "ref_bias": torch.randn(V),
    }
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires a gradient, expected a constant.*{name}\.detach\(\)"):
        linear_kl(**given)
    with torch.no_grad():
        assert linear_kl(**given).isfinite().all()


OPERATORS = {"onecard::linear_kl": source._forward._init_fn}
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Watch(TorchDispatchMode):
    """Largest output, in elements, of any operator, and the shapes of the products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = OPERATORS.get(func._schema.name)  # into our own operator, which else would be one step
        with nullcontext() if inside is None else self:
            out = (inside or func)(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        if func.overloadpacket in PRODUCTS:
            self.products.append(tuple(out.shape))
        return out


def test_a_shared_head_takes_one_product_for_both_states() -> None:
    hidden, ref, weight = torch.randn(T, D), torch.randn(T, D), torch.randn(V, D)
    leaf = hidden.clone().requires_grad_()
    with tuning.override(rows=1000):
        with Watch() as value:
            linear_kl(hidden, ref, weight)
        with Watch() as training:
            kl = linear_kl(leaf, ref, weight)
        with Watch() as backward:
            kl.sum().backward()
        with Watch() as other:
            linear_kl(leaf, ref, weight, ref_weight=weight.clone())
    assert value.products == [(2 * T, V)]
    assert training.products == [(2 * T, V), (T, D)]
    assert backward.products == []
    assert other.products == [(T, V), (T, V), (T, D)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_by_vocabulary(dtype: torch.dtype) -> None:
    n, v = 96, 1031
    hidden = torch.randn(2, n // 2, D, dtype=dtype, requires_grad=True)
    ref, weight = torch.randn(2, n // 2, D, dtype=dtype), torch.randn(v, D, dtype=dtype)
    with tuning.override(rows=8), Watch() as watch:
        linear_kl(hidden, ref, weight, softcap=9.0).sum().backward()
    assert watch.largest <= 8 * v
    assert len(watch.products) == 2 * n // 4


def test_a_result_changed_in_place_leaves_the_gradient_alone() -> None:
    hidden, ref, weight = torch.randn(T, D, requires_grad=True), torch.randn(T, D), torch.randn(V, D)
    plain, changed = linear_kl(hidden, ref, weight), linear_kl(hidden, ref, weight).mul_(2)
    gradients = [torch.autograd.grad(x.sum(), hidden)[0] for x in (plain, changed)]
    assert torch.equal(gradients[1] / 2, gradients[0])


@pytest.mark.parametrize("own_head", [False, True])
def test_autocast_casts_hidden_states_and_heads(own_head: bool) -> None:
    hidden, ref, weight = torch.randn(T, D), torch.randn(T, D), torch.randn(V, D)
    grad, heads = torch.ones(T), {"ref_weight": torch.randn(V, D)} if own_head else {}
    plain = with_gradient(linear_kl, hidden, ref, weight, grad=grad, **heads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradient(linear_kl, hidden, ref, weight, grad=grad, **heads)
        with torch.autocast("cpu", enabled=False):
            off = with_gradient(linear_kl, hidden, ref, weight, grad=grad, **heads)
    rounded = (x.bfloat16() for x in (hidden, ref, weight))
    cast = with_gradient(linear_kl, *rounded, grad=grad, **{name: x.bfloat16() for name, x in heads.items()})
    assert all(torch.equal(a, b.float()) for a, b in zip(got, cast, strict=True))
    assert all(map(torch.equal, off, plain))
    assert not torch.equal(got[0], plain[0])
