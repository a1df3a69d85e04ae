"""What only a GPU shows: products of 16-bit inputs with fp32 output, real sizes, the memory that is really used."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import peak_bytes
from onecard_kernels import linear_logprobs, selective_log_softmax
from onecard_kernels.logprob import matmul
from tests.closeness import LOGPROB_TOLERANCES, assert_within, error
from tests.gpu.card import BF16, DEVICE, DTYPES, FP32, HALF, Shape, inputs, normal, sized, truth
from tests.kernels import oracle


def chosen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return oracle.selective_log_softmax(logits, targets).logprobs


@pytest.mark.parametrize("dtype", HALF)
def test_products_of_16_bits_come_out_in_fp32(dtype: str) -> None:
    """Log-probabilities within 1e-4 of fp64 of the same inputs; a product that rounds its result could not be."""
    n, d, v = sized((300, 4096, 128256), (20, 64, 300))
    hidden, weight, targets = inputs(n, d, v, HALF[dtype])
    operand = matmul.operand_dtype(hidden.dtype, weight.dtype, FP32, DEVICE)
    assert operand == sized(HALF[dtype], FP32)
    scratch = matmul.scratch_for(weight, operand, v)
    logits = torch.full((n, v), float("nan"), device=DEVICE)
    matmul.project(hidden.to(operand), weight, logits, scratch)
    exact = hidden.double() @ weight.double().T
    assert_within(logits, exact, 5e-4)  # of up to 25: tensor cores may cut off what they add, not round it
    right = chosen(exact, targets)
    assert_within(chosen(logits, targets), right, 1e-4)
    rounded = hidden @ weight.T
    assert error(rounded, exact) > 5e-4
    assert error(chosen(rounded.float(), targets), right) > 5e-4


@pytest.mark.parametrize("dtype", HALF)
def test_the_backward_s_products_of_16_bits_come_out_in_fp32(dtype: str) -> None:
    """Both, added to what is there: by hidden over all columns of the vocabulary, by the head over all tokens."""
    n, d, v = sized((300, 512, 128256), (20, 64, 300))
    hidden, weight, _ = inputs(n, d, v, HALF[dtype])
    operand = matmul.operand_dtype(hidden.dtype, weight.dtype, FP32, DEVICE)
    scratch = matmul.scratch_for(weight, operand, v)
    slopes = normal(n, v).to(operand)
    exact = slopes.double() @ weight.double()
    tolerance = 2.0**-12 * float(exact.abs().max())  # of long sums on tensor cores, see above; bf16 rounds at 2^-9
    first = matmul.project_back(slopes, weight, None, FP32, scratch)
    assert first.dtype == FP32
    assert_within(first, exact, tolerance)
    assert_within(matmul.project_back(slopes, weight, first, FP32, scratch), 2 * exact, 2 * tolerance)
    exact = slopes.double().T @ hidden.double()
    total = torch.ones(v, d, device=DEVICE)
    matmul.outer(slopes, hidden.to(operand), total)
    assert_within(total, exact + 1, 2.0**-16 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", sized([(300, 128, 32000), (1100, 896, 151936), (64, 256, 50257)], [(20, 16, 131)]), ids=str
)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_values_and_gradients_against_fp64(dtype: str, shape: Shape, trained: bool) -> None:
    """The default path: chunks with a remainder, and a vocabulary that no block size divides."""
    hidden, weight, targets = inputs(*shape, DTYPES[dtype])
    upstream = normal(shape[0])
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]
    got = linear_logprobs(hidden, weight, targets).logprobs
    gradients = torch.autograd.grad(got, leaves, upstream)
    found = []
    for products_in, softmax_in in ((torch.float64, torch.float64), (DTYPES[dtype], FP32)):
        h, w = (x.detach().to(products_in).requires_grad_(x.requires_grad) for x in (hidden, weight))
        logp = chosen((h @ w.T).to(softmax_in), targets)
        found.append((logp.detach(), torch.autograd.grad(logp, [h, w][: len(leaves)], upstream.to(logp))))
    (right, true_gradients), (_, eager_gradients) = found
    assert_within(got, right, LOGPROB_TOLERANCES[DTYPES[dtype], 4])
    for ours, eagers, true in zip(gradients, eager_gradients, true_gradients, strict=True):
        assert error(ours, true) <= 2 * error(eagers, true)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_selective_log_softmax_against_fp64(dtype: str) -> None:
    n, v = sized((257, 50257), (20, 131))
    logits = (normal(n, v) * 4).to(DTYPES[dtype])
    targets = torch.randint(v, (n,), device=DEVICE)
    got = selective_log_softmax(logits, targets, return_entropy=True)
    right = oracle.selective_log_softmax(logits.double(), targets, return_entropy=True)
    assert_within(got.logprobs, right.logprobs, 2e-5)
    assert got.entropy is not None
    assert right.entropy is not None
    assert_within(got.entropy, right.entropy, 1e-4)


def test_workspace_is_below_a_gigabyte_at_8b_shapes() -> None:
    """N = 8192, D = 4096, V = 128256: the full bf16 logits would be 1.96 GiB, in fp32 with their gradient 7.8 GiB."""
    hidden, weight, targets = inputs(*sized((8192, 4096, 128256), (40, 16, 131)), BF16)
    hidden.requires_grad_()
    linear_logprobs(hidden[:8], weight, targets[:8])  # the BLAS library's own workspace is not ours
    assert 0 < peak_bytes(lambda: linear_logprobs(hidden, weight, targets), DEVICE) < 1 << 30
    linear_logprobs(hidden, weight, targets).logprobs.backward(normal(targets.numel()))
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_more_logits_than_an_int32_counts() -> None:
    """20,000 x 151,936 logits pass 2^31, in chunks: the last row must be as right as the first."""
    n, d, v = sized((20000, 64, 151936), (20, 16, 131))
    hidden, weight, targets = inputs(n, d, v, BF16)
    with torch.no_grad():
        got = linear_logprobs(hidden, weight, targets).logprobs
    ends = torch.tensor([0, 1, n - 2, n - 1], device=DEVICE)
    right, _ = truth(hidden[ends], weight, targets[ends], torch.ones(4, device=DEVICE), torch.float64)
    assert_within(got[ends], right, LOGPROB_TOLERANCES[BF16, 4])
