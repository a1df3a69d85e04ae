"""Named regressions that only a card shows, by its size or its arithmetic. The list is in tests/kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from onecard_kernels import gae, linear_kl, linear_logprobs, linear_ppo_loss, logits_ppo_loss, ppo_loss, value_loss
from onecard_kernels import selective_log_softmax as selective
from onecard_kernels.logprob import plans, reference
from tests.closeness import LOGPROB_BARS, assert_like_eager, assert_within

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**LOW, "fp32": torch.float32}
SHAPES = [(1100, 896, 151936), (300, 2048, 128256), (64, 768, 50257)]  # two chunks and a rest; odd rows of the head
PATHS = [(i, b) for i in ("chunked", "low_memory") for b in ("torch", "triton")]
MANY = 65536 + 5  # rows, more than the second dimension of a grid holds
FAR = (20000, 151936)  # more logits than an int32 counts, and in bf16 6 GB of them

over_paths = pytest.mark.parametrize(("implementation", "backend"), PATHS)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """fp32 products in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def inputs(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of standard deviation 4; the last target is the last column."""
    targets = torch.randint(v, (n,), device=DEVICE)
    targets[-1] = v - 1
    return normal(n, d).to(dtype), (normal(v, d) * 4 / d**0.5).to(dtype), targets


def in_parts(n: int, rows: int = 128) -> Iterator[slice]:
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def truth(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the gradient by hidden in `dtype`, a few rows at a time."""
    head, values, grads = weight.to(dtype), [], []
    for part in in_parts(hidden.shape[0]):
        leaf = hidden[part].detach().to(dtype).requires_grad_()
        logp = reference.linear_logprobs(leaf, head, targets[part]).logprobs
        grads.append(torch.autograd.grad(logp, leaf, upstream[part].to(logp))[0])
        values.append(logp.detach())
    return torch.cat(values), torch.cat(grads)


@contextmanager
def path(implementation: str) -> Iterator[None]:
    with plans.override(implementation=implementation):
        yield


@over_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_implementation_at_real_sizes(
    shape: tuple[int, int, int], dtype: str, implementation: str, backend: str
) -> None:
    hidden, weight, targets = inputs(*shape, DTYPES[dtype])
    upstream = normal(shape[0])
    right, right_grad = truth(hidden, weight, targets, upstream, torch.float64)
    _, eager_grad = truth(hidden, weight, targets, upstream, DTYPES[dtype])
    leaf = hidden.requires_grad_()
    with path(implementation):
        got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
        grad = torch.autograd.grad(got, leaf, upstream)[0]
    assert_within(got, right, LOGPROB_BARS[DTYPES[dtype], 4])
    assert_like_eager(grad, eager_grad, right_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tensor_cores_of_the_tiled_forward(shape: tuple[int, int, int], dtype: str) -> None:
    hidden, weight, targets = inputs(*shape, DTYPES[dtype])
    right, _ = truth(hidden, weight, targets, torch.ones(shape[0], device=DEVICE), torch.float64)
    with path("tiled"), torch.no_grad():
        out = linear_logprobs(hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True)
    assert_within(out.logprobs, right, LOGPROB_BARS[DTYPES[dtype], 4])
    with path("chunked"), torch.no_grad():
        other = linear_logprobs(hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True)
    for mine, others, bar in zip(out[1:], other[1:], (1e-4, 2e-4), strict=True):
        assert mine is not None
        assert others is not None
        assert_within(mine, others, bar)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", LOW)
def test_confident_tokens_keep_the_true_class_gradient(dtype: str, backend: str) -> None:
    """1 - p_y down to 2e-5, relative to itself, through products of 16 bit. The loss is scaled: fp16 ends at 6e-8."""
    n, v = 256, 1024
    weight = (torch.linalg.qr(normal(v, v)).Q * 4).to(LOW[dtype])
    targets = torch.arange(n, device=DEVICE)
    hidden = (weight[targets].float() * torch.linspace(0.6, 1.1, n, device=DEVICE).unsqueeze(1)).to(LOW[dtype])
    right, right_grad = truth(hidden, weight, targets, torch.full((n,), 1024.0, device=DEVICE), torch.float64)
    for implementation in ("chunked", "low_memory"):
        leaf = hidden.clone().requires_grad_()
        with path(implementation):
            got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
        grad = torch.autograd.grad(got.sum() * 1024.0, leaf)[0]
        assert_within(got / right, torch.ones_like(right), 2e-5)
        both = [(g.double() @ weight.double().T).gather(1, targets.unsqueeze(1)) for g in (grad, right_grad)]
        assert_within(both[0] / both[1], torch.ones_like(both[1]), 2.0**-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_rows_than_a_grid_dimension_holds(backend: str) -> None:
    d, v = 16, 67
    hidden, weight, targets = inputs(MANY, d, v, torch.float32)
    upstream = normal(MANY)
    right, right_grad = truth(hidden, weight, targets, upstream, torch.float64)
    for implementation in ("chunked", "low_memory"):
        leaf = hidden.clone().requires_grad_()
        with plans.override(implementation=implementation, rows=1 << 20, columns=40):
            got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
        assert_within(got, right, LOGPROB_BARS[torch.float32, 4])
        assert_within(torch.autograd.grad(got, leaf, upstream)[0], right_grad, 1e-4)
    with path("tiled"), torch.no_grad():
        assert_within(linear_logprobs(hidden, weight, targets).logprobs, right, LOGPROB_BARS[torch.float32, 4])
    logits = (hidden @ weight.T).requires_grad_()
    got = selective(logits, targets, backend=backend).logprobs
    assert_within(got, right, LOGPROB_BARS[torch.float32, 4])
    loss = logits_ppo_loss(logits, targets, right.float(), upstream, torch.ones(MANY, device=DEVICE), backend=backend)
    assert_within(torch.autograd.grad(loss.loss * MANY, logits)[0] @ weight, -right_grad, 2e-4)
    kl = linear_kl(hidden, hidden + 0.1, weight, backend=backend)
    assert kl.shape == (MANY,)
    assert kl.isfinite().all()
    ones = torch.ones(MANY, 3, device=DEVICE)
    returns = gae(ones, ones, ones, backend=backend).returns
    assert torch.equal(returns, returns[:1].expand(MANY, 3))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_contiguous_logits_beyond_two_to_the_31(backend: str) -> None:
    """The last row's offset does not fit an int32, in the forward and in a gradient written in place."""
    n, v = FAR
    logits = torch.empty(FAR, device=DEVICE, dtype=torch.bfloat16)
    for part in in_parts(n, 1000):
        logits[part] = normal(logits[part].shape[0], v)
    ends = torch.tensor([0, 1, n - 2, n - 1], device=DEVICE)
    targets = torch.randint(v, (n,), device=DEVICE)
    small = logits[ends].double().requires_grad_()
    right = reference.selective_log_softmax(small, targets[ends]).logprobs
    right_grad = torch.autograd.grad(right.sum(), small)[0]
    leaf = logits.requires_grad_()
    got = selective(leaf, targets, inplace_backward=True, backend=backend).logprobs
    assert_within(got[ends], right, 2e-5)
    grad = torch.autograd.grad(got.sum(), leaf)[0]
    assert_within(grad[ends], right_grad, 2.0**-8)


@over_paths
def test_chunks_beyond_two_to_the_31(implementation: str, backend: str) -> None:
    """One chunk with all logits of 20,000 tokens."""
    (n, v), d = FAR, 64
    hidden, weight, targets = inputs(n, d, v, torch.bfloat16)
    ends = torch.tensor([0, 1, n - 2, n - 1], device=DEVICE)
    right, right_grad = truth(hidden[ends], weight, targets[ends], torch.ones(4, device=DEVICE), torch.float64)
    leaf = hidden.requires_grad_()
    with plans.override(implementation=implementation, rows=n, columns=v - 7):
        got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
    assert_within(got[ends], right, LOGPROB_BARS[torch.bfloat16, 4])
    grad = torch.autograd.grad(got.sum(), leaf)[0]
    assert_within(grad[ends], right_grad, 2.0**-6 * float(right_grad.abs().max()))


def ppo_step(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, backend: str) -> tuple[Any, ...]:
    """Every loss once, and the gradients by hidden, head and values."""
    n = targets.shape[0]
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    values = torch.linspace(-1, 1, n, device=DEVICE).requires_grad_()
    mask = torch.arange(n, device=DEVICE) % 5 != 3
    old = torch.full((n,), -8.0, device=DEVICE)
    advantages, returns = gae(-values.detach().view(1, n), values.detach().view(1, n), mask.view(1, n), backend=backend)
    args = (old, advantages.view(n), mask)
    options: dict[str, Any] = {"entropy_coef": 0.01, "ref_logprobs": old, "kl_coef": 0.05, "backend": backend}
    first = linear_ppo_loss(h, w, targets, *args, **options)
    second = linear_ppo_loss(h, w.detach(), targets, *args, **options)
    logp = linear_logprobs(h, w, targets, entropy_requires_grad=True, backend=backend)
    third = ppo_loss(logp.logprobs, *args, entropy=logp.entropy, **options)
    fourth = logits_ppo_loss((h @ w.T), targets, *args, **options)
    critic = value_loss(values, values.detach() + 0.3, returns.view(n), mask, backend=backend)
    losses = [x.loss for x in (first, second, third, fourth, critic)]
    return *losses, *torch.autograd.grad(torch.stack(losses).sum(), (h, w, values))


@over_paths
def test_two_runs_are_equal_to_the_last_bit(implementation: str, backend: str) -> None:
    hidden, weight, targets = inputs(513, 256, 50257, torch.bfloat16)
    with plans.override(implementation=implementation, rows=200, columns=10000):
        first, second = (ppo_step(hidden, weight, targets, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(x.isfinite().all() for x in first)


@over_paths
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_changes_nothing(dtype: str, implementation: str, backend: str) -> None:
    hidden, weight, targets = inputs(130, 256, 32000, torch.float32)

    def run() -> tuple[torch.Tensor, ...]:
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprobs(leaf, head, targets, entropy_requires_grad=True, backend=backend)
        assert out.entropy is not None
        grads = torch.autograd.grad((out.logprobs + out.entropy).sum(), (leaf, head))
        return out.logprobs, out.entropy, *grads

    with path(implementation):
        plain = run()
        with torch.autocast(DEVICE, dtype=LOW[dtype]):
            inside = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_compiles_as_one_graph(backend: str) -> None:
    hidden, weight, targets = inputs(130, 128, 32000, torch.bfloat16)
    mask, old = torch.ones(130, device=DEVICE), torch.full((130,), -8.0, device=DEVICE)

    def step(h: torch.Tensor) -> torch.Tensor:
        args = (targets, old, old + 7.5, mask)
        loss = linear_ppo_loss(h, weight, *args, entropy_coef=0.01, backend=backend).loss
        return loss + linear_logprobs(h, weight, targets, backend=backend).logprobs.mean()

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaf = hidden.clone().requires_grad_()
        loss = run(leaf)
        assert loss.dtype == torch.float32
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert_within(results[1][0], results[0][0], 1e-5)
    assert_within(results[1][1], results[0][1], 2.0**-7 * float(results[0][1].abs().max()))
