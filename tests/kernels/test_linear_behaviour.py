"""What linear_logprobs does besides the numbers: masks, layouts, repeated backwards, autocast, memory, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from onecard_kernels import linear_logprobs
from onecard_kernels.logprob import linear, tuning
from tests.closeness import LOGPROB_TOLERANCES, assert_within
from tests.kernels import oracle

TOLERANCE = LOGPROB_TOLERANCES[torch.float32, 4]
B, T, D, V = 3, 5, 8, 131  # 131: prime, so no block or tile divides it


@pytest.fixture(autouse=True, params=["chunked", "low_memory"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles with a remainder, each way, and several blocks of rows in each."""
    monkeypatch.setattr("onecard_kernels.logprob.rows.BLOCK_BYTES", 3 * 40 * 4)
    with tuning.override(implementation=request.param, rows=4, columns=40):
        yield


def inputs(train: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(B, T, D, requires_grad=True)
    weight = (torch.randn(V, D) * 1.4).requires_grad_(train)
    return hidden, weight, torch.randint(V, (B, T))


MASKS = {
    "none valid": torch.zeros(B, T),
    "one row": torch.tensor([[0] * T, [1] * T, [0] * T]),
    "one fully masked row": torch.tensor([[1] * T, [0] * T, [1] * T]),
    "last token": torch.tensor([[0] * T, [0] * T, [0] * (T - 1) + [1]]).bool(),
    "first token": torch.tensor([[1] + [0] * (T - 1), [0] * T, [0] * T]).bool(),
    "checkered": torch.arange(B * T).reshape(B, T) % 2,
    "all": torch.ones(B, T, dtype=torch.bool),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("pattern", MASKS)
def test_masks(pattern: str, train: bool) -> None:
    """Masked tokens give exact zeros in value and gradient, whatever stands in their hidden states and targets."""
    mask = MASKS[pattern]
    hidden, weight, targets = inputs(train)
    grad, valid = torch.randn(B, T), mask.bool()
    truth = oracle.linear_logprobs(hidden.double(), weight.double(), targets, mask=mask, entropy_requires_grad=True)
    leaves = (hidden, weight) if train else (hidden,)
    true_grads = torch.autograd.grad((truth.logprobs * grad + truth.entropy).sum(), leaves)

    dirty = hidden.detach().masked_fill(~valid.unsqueeze(-1), float("nan")).requires_grad_()
    got = linear_logprobs(dirty, weight, targets.masked_fill(~valid, -100), mask=mask, entropy_requires_grad=True)
    grads = torch.autograd.grad((got.logprobs * grad + got.entropy).sum(), (dirty, weight) if train else (dirty,))
    assert torch.equal(got.logprobs[~valid], torch.zeros(int((~valid).sum())))
    assert torch.equal(grads[0][~valid], torch.zeros(int((~valid).sum()), D))
    assert_within(got.logprobs, truth.logprobs, TOLERANCE)
    for mine, true in zip(grads, true_grads, strict=True):
        assert_within(mine, true, 2e-5)


@pytest.mark.parametrize("train", [False, True])
def test_second_backward_is_equal(train: bool) -> None:
    hidden, weight, targets = inputs(train)
    leaves = (hidden, weight) if train else (hidden,)
    loss = linear_logprobs(hidden, weight, targets).logprobs.square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("train", [False, True])
def test_changing_an_output_in_place_leaves_the_gradient_alone(train: bool) -> None:
    hidden, weight, targets = inputs(train)
    plain = torch.autograd.grad(linear_logprobs(hidden, weight, targets).logprobs.sum() * 2, hidden)[0]
    assert torch.equal(
        torch.autograd.grad(linear_logprobs(hidden, weight, targets).logprobs.mul_(2).sum(), hidden)[0], plain
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_hidden_states_and_head(train: bool, dtype: torch.dtype) -> None:
    """As it does for a linear layer, and with a backward outside of it; the way back is to switch it off."""
    hidden, weight, targets = inputs(train)

    def run(cast: torch.dtype | None = None) -> list[torch.Tensor]:
        operands = (hidden, weight) if cast is None else (hidden.to(cast), weight.to(cast))
        out = linear_logprobs(*operands, targets, entropy_requires_grad=True)
        return [out.logprobs, out.entropy]

    def grads(out: list[torch.Tensor]) -> list[torch.Tensor]:
        return [*out, *torch.autograd.grad((out[0] + out[1]).sum(), (hidden, weight) if train else (hidden,))]

    with torch.autocast("cpu", dtype=dtype):
        inside = run()
        with torch.autocast("cpu", enabled=False):
            off = run()
    inside, off, cast, plain = map(grads, (inside, off, run(dtype), run()))
    assert all(x.dtype == torch.float32 for x in inside)
    assert all(map(torch.equal, inside, cast))
    assert all(map(torch.equal, off, plain))
    assert not torch.equal(inside[0], plain[0])
    with torch.autocast("cpu", dtype=dtype):
        wide = linear_logprobs(hidden.double(), weight, targets).logprobs
    assert torch.equal(wide, linear_logprobs(hidden.double(), weight, targets).logprobs)  # as autocast leaves fp64


@pytest.mark.parametrize("train", [False, True])
def test_a_forbidden_target_is_impossible_and_has_no_gradient(train: bool) -> None:
    hidden, weight, targets = inputs(train)
    forbidden = torch.zeros(V, dtype=torch.bool)
    forbidden[3] = forbidden[V - 1] = True
    targets[targets == 3] = 4
    targets[targets == V - 1] = 4
    targets[0, 0], targets[2, 1] = 3, V - 1
    out = linear_logprobs(hidden, weight, targets, forbidden=forbidden, softcap=3.0, return_entropy=True)
    hit = torch.zeros(B, T, dtype=torch.bool)
    hit[0, 0] = hit[2, 1] = True
    assert torch.equal(out.logprobs == float("-inf"), hit)
    assert out.entropy is not None
    assert out.entropy.isfinite().all()
    out.logprobs.exp().sum().backward()
    for leaf in (hidden, weight) if train else (hidden,):
        assert leaf.grad.isfinite().all()
    loss = linear_logprobs(hidden, weight, targets, forbidden=forbidden).logprobs  # and of an infinite derivative:
    grad = torch.autograd.grad(loss, hidden, torch.full((B, T), 1.0).masked_fill(hit, float("inf")))[0]
    assert torch.equal(grad[hit], torch.zeros(2, D))
    assert grad.isfinite().all()


def test_entropy_without_gradient_is_detached() -> None:
    hidden, weight, targets = inputs(train=True)
    out = linear_logprobs(hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True)
    assert not out.entropy.requires_grad
    assert not out.log_sum_sq_probs.requires_grad
    assert linear_logprobs(hidden, weight, targets)[1:] == (None, None)
    assert linear_logprobs(hidden, weight, targets, entropy_requires_grad=True).entropy.requires_grad
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets, entropy_requires_grad=True).logprobs.requires_grad


OPERATORS = {op._qualname: op._init_fn for op in vars(linear).values() if isinstance(op, CustomOpDef)}


class Watch(TorchDispatchMode):
    """Largest output, in elements, of any operator, and the number of products with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = OPERATORS.get(func._schema.name)  # into our own operators, which else would be one step
        with nullcontext() if inside is None else self:
            out = (inside or func)(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_no_tensor_of_tokens_by_vocabulary(train: bool, dtype: torch.dtype) -> None:
    n, v = 96, 1031
    hidden = torch.randn(2, n // 2, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, D, dtype=dtype, requires_grad=train)
    mask = torch.ones(2, n // 2).index_fill_(1, torch.tensor([3, 5]), 0)
    with tuning.override(rows=8, columns=300), Watch() as watch:
        out = linear_logprobs(
            hidden, weight, torch.randint(v, (2, n // 2)), mask=mask, softcap=9.0, entropy_requires_grad=True
        )
        (out.logprobs + out.entropy).sum().backward()
    assert watch.largest < n * v / 8
    assert watch.products >= 3 * n // 8


def test_frozen_head_takes_two_products_and_no_gradient_one() -> None:
    """One chunk: logits and direction; the backward multiplies with no head at all."""
    hidden, weight, targets = inputs()
    with tuning.override(rows=1000, columns=1000):
        with Watch() as forward:
            out = linear_logprobs(hidden, weight, targets, return_entropy=True)
        with Watch() as backward:
            out.logprobs.sum().backward()
        with Watch() as scoring, torch.no_grad():
            linear_logprobs(hidden, weight, targets)
        with Watch() as detached:
            linear_logprobs(hidden.detach(), weight, targets)
    assert [w.products for w in (forward, backward, scoring, detached)] == [2, 0, 1, 1]
