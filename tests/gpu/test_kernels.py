"""What only a GPU shows: products of 16-bit inputs with fp32 output, real sizes, the memory that is really used."""

from __future__ import annotations

import pytest
import torch

from onecard_kernels import linear_logprobs, selective_log_softmax
from tests.closeness import LOGPROB_BARS, assert_within, error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and head whose logits have a standard deviation of 4, targets, and a gradient per token."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    hidden = normal(n, d).to(dtype).requires_grad_()
    weight = (normal(v, d) * 4 / d**0.5).to(dtype)
    targets = torch.randint(v, (n,), device="cuda", generator=generator)
    return hidden, weight, targets, normal(n)


def truth(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden.double() @ weight.double().T
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 128, 32000), (1100, 896, 151936), (64, 256, 50257)])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_against_fp64(dtype, shape, trained):
    """Two chunks with a remainder, and a vocabulary that no block size divides."""
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, targets, upstream = inputs(*shape, dtype)
    weight.requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]
    got = linear_logprobs(hidden, weight, targets).logprobs
    expected = truth(hidden, weight, targets)
    assert_within(got, expected, LOGPROB_BARS[dtype, 4])
    gradients = torch.autograd.grad(got, leaves, upstream)
    true_gradients = torch.autograd.grad(expected, leaves, upstream.double())
    eager = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    eager_gradients = torch.autograd.grad(eager, leaves, upstream)
    for ours, eagers, right in zip(gradients, eager_gradients, true_gradients, strict=True):
        assert error(ours, right) <= 2 * error(eagers, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_selective_log_softmax_against_fp64(dtype):
    logits = (torch.randn(257, 50257, device="cuda") * 4).to(dtype).requires_grad_()
    targets = torch.randint(50257, (257,), device="cuda")
    got = selective_log_softmax(logits, targets, return_entropy=True)
    logp = logits.double().log_softmax(-1)
    assert_within(got.logprobs, logp.gather(-1, targets[:, None]).squeeze(-1), 2e-5)
    assert_within(got.entropy, -(logp.exp() * logp).sum(-1), 1e-4)


def test_workspace_is_below_a_gigabyte_at_8b_shapes():
    """N = 8192, D = 4096, V = 128256: the full bf16 logits would be 1.96 GiB, in fp32 with their gradient 7.8 GiB."""
    hidden, weight, targets, upstream = inputs(8192, 4096, 128256, torch.bfloat16)
    linear_logprobs(hidden[:8], weight, targets[:8])  # the BLAS library's own workspace is not ours
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs = linear_logprobs(hidden, weight, targets).logprobs
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
    logprobs.backward(upstream)
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_more_logits_than_an_int32_counts():
    """20,000 x 151,936 logits pass 2^31, in chunks: the last row must be as right as the first."""
    hidden, weight, targets, _ = inputs(20000, 64, 151936, torch.bfloat16)
    with torch.no_grad():
        got = linear_logprobs(hidden, weight, targets).logprobs
        ends = torch.tensor([0, 1, 19998, 19999], device="cuda")
        assert_within(got[ends], truth(hidden[ends], weight, targets[ends]), LOGPROB_BARS[torch.bfloat16, 4])
