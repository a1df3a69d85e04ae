"""selective_log_softmax on both backends against the reference in fp64, and what it does to memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import onecard_kernels
from onecard_kernels.logprob import rows, selective
from tests.closeness import LOGPROB_TOLERANCES, assert_like_eager, assert_within
from tests.kernels import oracle

# Prime vocabularies, and one above the block of the fixture, so that blocks hold from one row to several.
SHAPES = [((), 5), ((3,), 1), ((2, 3), 127), ((3, 2), 1031)]


@pytest.fixture(params=["torch", "triton"])
def selective_log_softmax(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        pytest.importorskip("triton")
    return partial(onecard_kernels.selective_log_softmax, backend=request.param)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard_kernels.logprob.torch_rows.BLOCK_BYTES", 3 * 127 * 4)


def run(
    fn: Any, logits: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor, **kw: Any
) -> tuple[Any, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    out = fn(leaf, targets, **kw)
    total = (out.logprobs * grad.to(out.logprobs)).sum()
    if kw.get("entropy_requires_grad"):
        total = total + (out.entropy * (grad + 1).to(out.entropy)).sum()
    total.backward()
    assert leaf.grad is not None
    return out, leaf.grad


@pytest.mark.parametrize("entropy", [None, "return_entropy", "entropy_requires_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(
    selective_log_softmax: Any, shape: tuple[tuple[int, ...], int], dtype: torch.dtype, entropy: str | None
) -> None:
    rows, v = shape
    logits = (torch.randn(*rows, v) * 4).to(dtype)
    targets, grad = torch.randint(v, rows), torch.randn(rows)
    kw: dict[str, Any] = {"temperature": 0.8, **({entropy: True} if entropy else {})}
    truth, true_grad = run(oracle.selective_log_softmax, logits.double(), targets, grad, **kw)
    _, eager_grad = run(oracle.selective_log_softmax, logits, targets, grad, **kw)
    got, mine = run(selective_log_softmax, logits, targets, grad, **kw)
    assert got.logprobs.dtype == torch.float32
    assert mine.dtype == dtype
    assert_within(got.logprobs, truth.logprobs, LOGPROB_TOLERANCES[torch.float32, 4])
    if entropy:
        assert_within(got.entropy, truth.entropy, LOGPROB_TOLERANCES[torch.float32, 4])
    assert_like_eager(mine, eager_grad, true_grad)


@pytest.mark.parametrize("inplace", [False, True])
def test_masked_rows_give_zeros(selective_log_softmax: Any, inplace: bool) -> None:
    logits = torch.randn(2, 5, 31)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    targets = torch.randint(31, (2, 5)).masked_fill(mask == 0, -100)
    grad = torch.randn(2, 5)
    dirty = logits.masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    truth, true_grad = run(oracle.selective_log_softmax, logits.double(), targets, grad, mask=mask)
    got, mine = run(selective_log_softmax, dirty, targets, grad, mask=mask, inplace_backward=inplace)
    assert torch.equal(got.logprobs[mask == 0], torch.zeros(7))
    assert torch.equal(mine[mask == 0], torch.zeros(7, 31))
    assert_within(got.logprobs, truth.logprobs, 2e-5)
    assert_within(mine, true_grad, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_non_contiguous_logits(selective_log_softmax: Any, inplace: bool, masked: bool) -> None:
    """`logits[:, :-1]` cannot be viewed as rows; the gradient must still land in the right ones."""
    full = torch.randn(3, 6, 17)
    mask = torch.arange(15).reshape(3, 5) % 2 if masked else None
    targets, grad = torch.randint(17, (3, 5)), torch.randn(3, 5)

    def run_slice(fn: Any, dtype: torch.dtype, **kw: Any) -> torch.Tensor:
        leaf = full.to(dtype, copy=True).requires_grad_()
        out = fn((leaf * 1)[:, :-1], targets, mask=mask, **kw).logprobs
        (out * grad).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    truth = run_slice(oracle.selective_log_softmax, torch.float64)
    assert_within(run_slice(selective_log_softmax, torch.float32, inplace_backward=inplace), truth, 1e-6)


def test_inplace_backward_reuses_the_logits_and_runs_once(selective_log_softmax: Any) -> None:
    leaf = torch.randn(4, 31, requires_grad=True)
    logits = leaf * 1
    seen: list[torch.Tensor] = []
    logits.register_hook(seen.append)
    loss = selective_log_softmax(logits, torch.arange(4), inplace_backward=True).logprobs.sum()
    loss.backward(retain_graph=True)
    assert seen[0].data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        loss.backward()


def test_inplace_backward_raises_for_others_who_saved_logits(selective_log_softmax: Any) -> None:
    logits = torch.randn(4, 31, requires_grad=True) * 1
    other = logits.square().sum()
    selective_log_softmax(logits, torch.arange(4), inplace_backward=True).logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_target_of_minus_infinity_has_no_gradient(selective_log_softmax: Any) -> None:
    logits = torch.randn(2, 9)
    logits[0, 4] = float("-inf")
    got, mine = run(selective_log_softmax, logits, torch.tensor([4, 4]), torch.ones(2), return_entropy=True)
    assert got.logprobs[0] == float("-inf")
    assert got.entropy.isfinite().all()
    assert torch.equal(mine[0], torch.zeros(9))
    assert mine.isfinite().all()


def test_saves_the_logits_and_no_softmax(selective_log_softmax: Any) -> None:
    logits = torch.randn(8, 1031, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        selective_log_softmax(logits, torch.arange(8), entropy_requires_grad=True)
    large = [x for x in saved if x.numel() >= logits.numel()]
    assert [x.data_ptr() for x in large] == [logits.data_ptr()]


def test_the_block_covers_all_rows() -> None:
    pieces = [p for p in rows.blocks(10, 1 << 19, 4)]
    assert [p.start for p in pieces] == [0, 2, 4, 6, 8]
    assert pieces[-1].stop == 10


def test_the_results_may_be_changed_in_place(selective_log_softmax: Any) -> None:
    """The backward reads none of them."""
    for inplace in (False, True):
        logits = torch.randn(4, 31, requires_grad=True)
        kw = {"entropy_requires_grad": True, "inplace_backward": inplace}
        out = selective_log_softmax(logits * 1, torch.arange(4), **kw)
        expected = torch.autograd.grad((2 * out.logprobs + 3 * out.entropy).sum(), logits)[0]
        out = selective_log_softmax(logits * 1, torch.arange(4), **kw)
        loss = (out.logprobs.mul_(2) + out.entropy.mul_(3)).sum()
        assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)


def test_a_backward_without_anything_to_do_spends_nothing(selective_log_softmax: Any) -> None:
    """return_entropy alone is detached, so no gradient comes."""
    logits = torch.randn(4, 31, requires_grad=True)
    out = selective_log_softmax(logits * 1, torch.arange(4), return_entropy=True, inplace_backward=True)
    assert out.logprobs.requires_grad
    assert not out.entropy.requires_grad


def test_compiles_as_one_graph(selective_log_softmax: Any) -> None:
    """inplace_backward has no effect there: the logits stay."""
    leaf, targets = torch.randn(2, 5, 31, requires_grad=True), torch.randint(31, (2, 5))
    options = {"temperature": 0.7, "mask": None, "return_entropy": True, "entropy_requires_grad": True}
    options["backend"] = selective_log_softmax.keywords["backend"]

    def step(x: torch.Tensor, inplace: bool) -> tuple[torch.Tensor, torch.Tensor]:
        out = selective.selective_log_softmax(x, targets, **options, inplace_backward=inplace)
        return out.logprobs, out.entropy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        expected, got = step(leaf, False), compiled(leaf, inplace)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        grads = [torch.autograd.grad((x * x + y).sum(), leaf)[0] for x, y in (expected, got)]
        assert torch.equal(grads[0], grads[1])


def test_nan_is_not_hidden(selective_log_softmax: Any) -> None:
    logits = torch.randn(2, 131)
    logits[0, 17] = float("nan")
    out = selective_log_softmax(logits, torch.tensor([3, 3]), return_entropy=True)
    assert out.logprobs.isnan().tolist() == [True, False]
    assert out.entropy.isnan().tolist() == [True, False]
