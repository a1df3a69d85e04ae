"""linear_logprobs against the reference in fp64, and against eager arithmetic of the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onecard_kernels import linear_logprobs
from onecard_kernels.logprob import tuning
from tests.closeness import LOGPROB_TOLERANCES, assert_like_eager, assert_within
from tests.kernels import oracle
from tests.kernels.operator_material import head_options

# (tokens, D, V). Vocabulary sizes are odd, prime or one off a power of two, so that no tile, block or vector of the
# code divides them; 4099 is above one upcast tile (4096) by 3; one token and one column are the degenerate ends; 70
# rows of 4099 make several elementwise blocks and, with the chunk budget below, several chunks.
SHAPES = [(1, 5, 7), (3, 8, 1), (17, 16, 127), (33, 12, 1025), (70, 24, 4099)]


def inputs(n: int, d: int, v: int, dtype: torch.dtype, std: float = 4.0) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(n, d).to(dtype)
    weight = (torch.randn(v, d) * std / d**0.5).to(dtype)
    return hidden, weight, torch.randint(v, (n,)), torch.randn(n)


def double(options: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if k == "bias" else x for k, x in options.items()}


def gradients(
    fn: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    grad: torch.Tensor,
    train: str,
    **kw: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Results and gradients with the head's `train` part ('', 'weight', 'bias', 'both') trained."""
    leaves = {"hidden": hidden.detach().clone().requires_grad_(), "weight": weight.detach().clone()}
    if kw.get("bias") is not None:
        kw["bias"] = leaves["bias"] = kw["bias"].detach().clone()
    for name in ("weight", "bias"):
        if train in (name, "both") and name in leaves:
            leaves[name].requires_grad_()
    out = fn(leaves["hidden"], leaves["weight"], targets, **kw)
    total = (out.logprobs * grad.to(out.logprobs)).masked_fill(out.logprobs.isinf(), 0.0).sum()
    if kw.get("entropy_requires_grad"):
        total = total + (out.entropy * grad.flip(0).to(out.entropy)).sum()
    total.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def compare(shape: tuple[int, int, int], dtype: torch.dtype, kind: str, train: str, std: int = 4, **kw: Any) -> None:
    n, d, v = shape
    hidden, weight, targets, grad = inputs(n, d, v, dtype, std)
    kw = {**head_options(kind, v, dtype), **kw}
    args = (targets, grad, train)
    truth, true_grads = gradients(oracle.linear_logprobs, hidden.double(), weight.double(), *args, **double(kw))
    _, eager_grads = gradients(oracle.linear_logprobs, hidden, weight, *args, **kw)
    got, grads = gradients(linear_logprobs, hidden, weight, *args, **kw)
    tolerance = LOGPROB_TOLERANCES[dtype, std] / kw.get("temperature", 1.0)
    assert got.logprobs.dtype == torch.float32
    assert_within(got.logprobs, truth.logprobs, tolerance, "logprobs")
    for name in ("entropy", "log_sum_sq_probs"):
        if getattr(truth, name) is not None:
            assert_within(getattr(got, name), getattr(truth, name), tolerance, name)
    assert grads.keys() == true_grads.keys()
    for name, true_grad in true_grads.items():
        assert grads[name].dtype == eager_grads[name].dtype
        assert_like_eager(grads[name], eager_grads[name], true_grad, f"d {name}")


@pytest.fixture(autouse=True, params=["chunked", "low_memory"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles with a remainder, each way, and several blocks of rows in each."""
    monkeypatch.setattr("onecard_kernels.logprob.rows.BLOCK_BYTES", 5 * 1000 * 4)
    with tuning.override(implementation=request.param, rows=32, columns=1000):
        yield


@pytest.mark.parametrize("train", ["", "weight"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_by_shape(shape: tuple[int, int, int], dtype: torch.dtype, train: str) -> None:
    compare(shape, dtype, "plain", train)


@pytest.mark.parametrize("train", ["", "weight", "bias", "both"])
@pytest.mark.parametrize("kind", ["bias", "temperature", "scale", "softcap", "forbidden", "all"])
def test_every_part_of_the_head(kind: str, train: str) -> None:
    compare((33, 12, 1025), torch.float32, kind, train)


@pytest.mark.parametrize("train", ["", "both"])
@pytest.mark.parametrize("kind", ["plain", "softcap", "all"])
@pytest.mark.parametrize("entropy", ["return_entropy", "entropy_requires_grad"])
def test_entropy_and_log_sum_sq_probs(kind: str, train: str, entropy: str) -> None:
    compare((17, 16, 127), torch.float32, kind, train, return_log_sum_sq_probs=True, **{entropy: True})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_with_everything(dtype: torch.dtype) -> None:
    compare((33, 16, 4099), dtype, "all", "both", entropy_requires_grad=True)


def test_wide_logits() -> None:
    compare((33, 16, 1025), torch.float32, "plain", "weight", std=30)


@pytest.mark.parametrize("train", ["", "weight"])
@pytest.mark.parametrize("margin", [7.0, 10.0, 14.0, 17.0])
def test_confident_tokens_keep_their_gradient(margin: float, train: str) -> None:
    """p from 0.99 to 1 - 1e-6 at |z| = 150: the place where summed max and log-sum lose 1 - p."""
    v, d = 127, 128
    weight = torch.eye(v, d)
    hidden = torch.full((v, d), -150.0)
    hidden[torch.arange(v), torch.arange(v)] = -150.0 + margin
    targets, grad = torch.arange(v), torch.randn(v)
    args = (targets, grad, train)
    truth, true_grads = gradients(oracle.linear_logprobs, hidden.double(), weight.double(), *args)
    _, eager_grads = gradients(oracle.linear_logprobs, hidden, weight, *args)
    got, grads = gradients(linear_logprobs, hidden, weight, *args)
    # Relative to 1 - p itself: 1 - p is summed, never 1 minus something.
    assert float((got.logprobs / truth.logprobs - 1).detach().abs().max()) < 1e-5
    for name, true_grad in true_grads.items():
        assert_like_eager(grads[name], eager_grads[name], true_grad, name)
    direction = grads["hidden"][targets, targets] / grad
    expected = true_grads["hidden"][targets, targets] / grad
    assert float((direction / expected - 1).abs().max()) < 1e-5


@pytest.mark.parametrize(("h", "w"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")])
@pytest.mark.parametrize("train", ["", "weight"])
def test_mixed_dtypes_keep_each_its_own_gradient_dtype(h: str, w: str, train: str) -> None:
    hidden, weight, targets, grad = inputs(17, 16, 127, torch.float64)
    hidden, weight = hidden.to(getattr(torch, h)), weight.to(getattr(torch, w))
    args = (targets, grad, train)
    truth, true_grads = gradients(oracle.linear_logprobs, hidden.double(), weight.double(), *args)
    _, eager_grads = gradients(oracle.linear_logprobs, hidden, weight, *args)
    got, grads = gradients(linear_logprobs, hidden, weight, *args)
    assert got.logprobs.dtype == (torch.float64 if w == "float64" else torch.float32)
    assert_within(got.logprobs, truth.logprobs, 2e-5)
    assert grads["hidden"].dtype == hidden.dtype
    for name, true_grad in true_grads.items():
        assert_like_eager(grads[name], eager_grads[name], true_grad, name)
