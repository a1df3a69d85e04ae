"""The Triton row kernels of selective_log_softmax: blocks, strides, far rows, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard_kernels import selective_log_softmax
from tests.closeness import LOGPROB_TOLERANCES, assert_like_eager, assert_within
from tests.kernels import oracle

rows = pytest.importorskip("onecard_kernels.logprob.triton_rows", reason="triton is not installed")
parts = pytest.importorskip("onecard_kernels.logprob.triton_row_parts")


def run(
    fn: Any, logits: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor, **kw: Any
) -> tuple[Any, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    out = fn(leaf, targets, **kw)
    total = (out.logprobs * grad.to(out.logprobs)).sum()
    if kw.get("entropy_requires_grad"):
        total = total + (out.entropy * (grad + 1).to(out.entropy)).sum()
    return out, torch.autograd.grad(total, leaf)[0]


def on_triton(logits: torch.Tensor, targets: torch.Tensor, **kw: Any) -> Any:
    return selective_log_softmax(logits, targets, **kw, backend="triton")


def compare(logits: torch.Tensor, targets: torch.Tensor, tolerance: float, **kw: Any) -> None:
    grad = torch.randn(targets.shape)
    kw = {"entropy_requires_grad": True, **kw}
    truth, true_grad = run(oracle.selective_log_softmax, logits.double(), targets, grad, **kw)
    _, eager_grad = run(oracle.selective_log_softmax, logits, targets, grad, **kw)
    got, mine = run(on_triton, logits, targets, grad, **kw)
    assert_within(got.logprobs, truth.logprobs, tolerance, "logp")
    assert_within(got.entropy, truth.entropy, tolerance, "entropy")
    assert mine.dtype == logits.dtype
    assert_like_eager(mine, eager_grad, true_grad)


# One column, less than a warp's, odd, a whole number of blocks and a rest, more than one block of the largest warps.
@pytest.mark.parametrize("v", [1, 7, 131, 1000, 1024, 4099, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabularies(v: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(4, v) * 4).to(dtype)
    compare(logits, torch.tensor([0, v - 1, v // 2, v // 3]), LOGPROB_TOLERANCES[torch.float32, 4], temperature=0.8)


def test_fp64_keeps_its_digits() -> None:
    logits, targets, grad = torch.randn(3, 131).double() * 4, torch.tensor([0, 130, 7]), torch.randn(3)
    kw = {"entropy_requires_grad": True, "temperature": 0.7}
    truth, true_grad = run(oracle.selective_log_softmax, logits, targets, grad, **kw)
    got, mine = run(on_triton, logits, targets, grad, **kw)
    assert got.logprobs.dtype == got.entropy.dtype == mine.dtype == torch.float64
    assert_within(got.logprobs, truth.logprobs, 1e-13)
    assert_within(got.entropy, truth.entropy, 1e-13)
    assert_within(mine, true_grad, 1e-13)


@pytest.mark.parametrize("away", [8.0, 12.0, 16.0, 20.0])
def test_a_confident_token_keeps_every_digit(away: float) -> None:
    """1 - p_y down to 1e-7, relative to itself, in the value, the gradient at the target and the entropy."""
    for shift in (0.0, 150.0, -150.0):
        logits = torch.full((1, 63), shift - 3.0)
        logits[:, 7] += away
        targets, grad = torch.tensor([7]), torch.ones(1)
        for kw in ({}, {"entropy_requires_grad": True}):
            truth, true_grad = run(oracle.selective_log_softmax, logits.double(), targets, grad, **kw)
            got, mine = run(on_triton, logits, targets, grad, **kw)
            assert_within(got.logprobs / truth.logprobs, torch.ones(1), 2e-5, "logp")
            assert_within(mine / true_grad, torch.ones(1, 63), 5e-5, "gradient")
            if kw:
                assert_within(got.entropy / truth.entropy, torch.ones(1), 2e-5, "entropy")


def test_low_precision_gradients_are_rounded_once() -> None:
    """p_y - 1 is formed before the rounding: one ulp (the interpreter truncates), also where p_y > 0.999."""
    logits = (torch.randn(3, 131) * 4).bfloat16()
    logits[:, 5] = 30.0
    targets, grad = torch.tensor([5, 5, 9]), torch.tensor([1.0, -2.0, 3.0])
    _, true_grad = run(oracle.selective_log_softmax, logits.double(), targets, grad)
    _, mine = run(on_triton, logits, targets, grad)
    assert bool(((mine.double() - true_grad).abs() <= true_grad.abs() * 2.0**-7 * 1.001).all())


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_peak_in_another_block(where: str) -> None:
    """Each thread's shift moves, or does not, when the peak comes."""
    v = 20000
    logits = torch.randn(2, v)
    logits[:, 3 if where == "before" else v - 3] = 80.0
    compare(logits, torch.tensor([v // 2, v - 1]), 2e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_strides(inplace: bool) -> None:
    """Slices of both leading dimensions, three loops, columns apart, and reordered dimensions."""
    base = torch.randn(2, 3, 2, 40)
    views = {
        "sliced": lambda x: x[:, :-1, 0, :37],
        "three loops": lambda x: x[:, :-1, :, :37],
        "columns apart": lambda x: x[:, 0, :, :3].transpose(1, 2),
        "every second": lambda x: x[..., ::2],
        "turned": lambda x: x[:, :, 0].transpose(0, 1),
        "one row": lambda x: x[1, 1, 1],
    }
    for name, view in views.items():
        logits = view(base)
        targets, grad = torch.randint(logits.shape[-1], logits.shape[:-1]), torch.randn(logits.shape[:-1])
        _, expected = run(oracle.selective_log_softmax, logits.double(), targets, grad)
        leaf = base.clone().requires_grad_()
        out = on_triton(view(leaf * 1), targets, inplace_backward=inplace)
        (out.logprobs * grad).sum().backward()
        assert leaf.grad is not None
        assert_within(view(leaf.grad), expected, 1e-6, name)
        assert_within(leaf.grad.abs().sum(), expected.abs().sum(), 1e-3, f"{name}: elsewhere")


def test_per_token_tensors_of_any_strides() -> None:
    logits = torch.randn(4, 3, 17)
    targets = torch.randint(17, (3, 4)).T
    mask = torch.tensor([True, False, True]).expand(4, 3)
    kw = {"mask": mask, "entropy_requires_grad": True}
    expected, true_grad = run(oracle.selective_log_softmax, logits.double(), targets, torch.ones(4, 3), **kw)
    leaf = logits.requires_grad_()
    out = on_triton(leaf, targets, **kw)
    (out.logprobs + 2 * out.entropy).sum().backward()  # gradients come expanded, all of one number
    assert_within(out.logprobs, expected.logprobs, 2e-5)
    assert leaf.grad is not None
    assert_within(leaf.grad, true_grad, 2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_masks_and_targets_of_any_dtype(dtype: torch.dtype) -> None:
    logits, mask = torch.randn(4, 17), torch.tensor([1, 0, 1, 0])
    targets = torch.tensor([0, 5, 16, 7])
    out = on_triton(logits, targets.to(torch.int16), mask=mask.to(dtype))
    assert torch.equal(out.logprobs, on_triton(logits, targets, mask=mask.bool()).logprobs)


def test_rows_without_a_gradient_are_not_read() -> None:
    """A clipped token has none: its row costs one write."""
    logits, targets = torch.randn(3, 17), torch.tensor([0, 5, 16])
    _, _, stats = rows.forward(logits, targets, None, 1.0, True)
    logits[1] = float("nan")
    grad = rows.backward(logits, targets, None, stats, torch.tensor([1.0, 0.0, 2.0]), None, 1.0)
    assert torch.equal(grad[1], torch.zeros(17))
    assert grad[0].isfinite().all()


def test_blocks_fit_the_row() -> None:
    for columns in (1, 7, 1000, 32000, 151936):
        for itemsize in (2, 4, 8):
            block = parts.block_for(columns, itemsize, largest=rows.FORWARD)
            size = block.unroll * block.threads * block.vector
            assert block.threads == 32 * block.warps
            assert block.vector * itemsize == 16
            assert size < 2 * columns or (block.unroll, block.warps) == (1, 1)
