"""Named regressions that only a card shows, by its size or its arithmetic. The list is in tests/kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard_kernels import (
    gae,
    linear_dpo_loss,
    linear_kl,
    linear_logprobs,
    linear_ppo_loss,
    logits_ppo_loss,
    masked_whiten,
    ppo_loss,
    value_loss,
)
from onecard_kernels import selective_log_softmax as selective
from onecard_kernels.logprob import tuning
from tests.closeness import LOGPROB_TOLERANCES, assert_like_eager, assert_within
from tests.gpu.card import (
    BF16,
    CARD,
    DEVICE,
    DTYPES,
    FP32,
    HALF,
    Shape,
    in_parts,
    inputs,
    needs_triton,
    normal,
    over_backends,
    over_paths,
    over_sizes,
    sized,
    truth,
)
from tests.kernels import oracle

MANY = sized(65536 + 5, 11)  # rows, more than the second dimension of a grid holds
FAR = sized((20000, 151936), (9, 131))  # more logits than an int32 counts, and in bf16 6 GB of them
SMALL_TILES = {"rows": sized(200, 4), "columns": sized(10000, 40)}
FEW = (6, 8, 67)  # tokens where every loss runs: the interpreter takes milliseconds for each program


@over_paths
@over_sizes
def test_each_implementation_at_real_sizes(shape: Shape, dtype: str, implementation: str, backend: str) -> None:
    hidden, weight, targets = inputs(*shape, DTYPES[dtype])
    upstream = normal(shape[0])
    right, right_grad = truth(hidden, weight, targets, upstream, torch.float64)
    _, eager_grad = truth(hidden, weight, targets, upstream, DTYPES[dtype])
    leaf = hidden.requires_grad_()
    with tuning.override(implementation=implementation):
        got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
        grad = torch.autograd.grad(got, leaf, upstream)[0]
    assert_within(got, right, LOGPROB_TOLERANCES[DTYPES[dtype], 4])
    assert_like_eager(grad, eager_grad, right_grad)


@needs_triton
@over_sizes
def test_the_tensor_cores_of_the_tiled_forward(shape: Shape, dtype: str) -> None:
    hidden, weight, targets = inputs(*shape, DTYPES[dtype])
    right, _ = truth(hidden, weight, targets, torch.ones(shape[0], device=DEVICE), torch.float64)
    with tuning.override(implementation="tiled"), torch.no_grad():
        out = linear_logprobs(hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True)
    assert_within(out.logprobs, right, LOGPROB_TOLERANCES[DTYPES[dtype], 4])
    with tuning.override(implementation="chunked"), torch.no_grad():
        other = linear_logprobs(hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True)
    for mine, others, tolerance in zip(out[1:], other[1:], (1e-4, 2e-4), strict=True):
        assert mine is not None
        assert others is not None
        assert_within(mine, others, tolerance)


@over_backends
@pytest.mark.parametrize("dtype", HALF)
def test_confident_tokens_keep_the_true_class_gradient(dtype: str, backend: str) -> None:
    """1 - p_y down to 2e-5, relative to itself, through products of 16 bit. The loss is scaled: fp16 ends at 6e-8."""
    n, v = sized((256, 1024), (16, 64))
    weight = (torch.linalg.qr(normal(v, v)).Q * 4).to(HALF[dtype])
    targets = torch.arange(n, device=DEVICE)
    hidden = (weight[targets].float() * torch.linspace(0.6, 1.1, n, device=DEVICE).unsqueeze(1)).to(HALF[dtype])
    right, right_grad = truth(hidden, weight, targets, torch.full((n,), 1024.0, device=DEVICE), torch.float64)
    for implementation in ("chunked", "low_memory"):
        leaf = hidden.clone().requires_grad_()
        with tuning.override(implementation=implementation):
            got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
        grad = torch.autograd.grad(got.sum() * 1024.0, leaf)[0]
        assert_within(got / right, torch.ones_like(right), 2e-5)
        both = [(g.double() @ weight.double().T).gather(1, targets.unsqueeze(1)) for g in (grad, right_grad)]
        assert_within(both[0] / both[1], torch.ones_like(both[1]), 2.0**-7)


@over_backends
def test_more_rows_than_a_grid_dimension_holds(backend: str) -> None:
    d, v = 16, 67
    hidden, weight, targets = inputs(MANY, d, v, FP32)
    upstream = normal(MANY)
    right, right_grad = truth(hidden, weight, targets, upstream, torch.float64)
    for implementation in ("chunked", "low_memory"):
        leaf = hidden.clone().requires_grad_()
        with tuning.override(implementation=implementation, rows=1 << 20, columns=40):
            got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
        assert_within(got, right, LOGPROB_TOLERANCES[FP32, 4])
        assert_within(torch.autograd.grad(got, leaf, upstream)[0], right_grad, 1e-4)
    with tuning.override(implementation="tiled"), torch.no_grad():
        assert_within(linear_logprobs(hidden, weight, targets).logprobs, right, LOGPROB_TOLERANCES[FP32, 4])
    logits = (hidden @ weight.T).requires_grad_()
    got = selective(logits, targets, backend=backend).logprobs
    assert_within(got, right, LOGPROB_TOLERANCES[FP32, 4])
    loss = logits_ppo_loss(logits, targets, right.float(), upstream, torch.ones(MANY, device=DEVICE), backend=backend)
    assert_within(torch.autograd.grad(loss.loss * MANY, logits)[0] @ weight, -right_grad, 2e-4)
    kl = linear_kl(hidden, hidden + 0.1, weight, backend=backend)
    assert kl.shape == (MANY,)
    assert kl.isfinite().all()
    ones = torch.ones(MANY, 3, device=DEVICE)
    returns = gae(ones, ones, ones, backend=backend).returns
    assert torch.equal(returns, returns[:1].expand(MANY, 3))


@over_backends
def test_contiguous_logits_beyond_two_to_the_31(backend: str) -> None:
    """The last row's offset does not fit an int32, in the forward and in a gradient written in place."""
    n, v = FAR
    logits = torch.empty(FAR, device=DEVICE, dtype=BF16)
    for part in in_parts(n, 1000):
        logits[part] = normal(logits[part].shape[0], v)
    ends = torch.tensor([0, 1, n - 2, n - 1], device=DEVICE)
    targets = torch.randint(v, (n,), device=DEVICE)
    small = logits[ends].double().requires_grad_()
    right = oracle.selective_log_softmax(small, targets[ends]).logprobs
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
    hidden, weight, targets = inputs(n, d, v, BF16)
    ends = torch.tensor([0, 1, n - 2, n - 1], device=DEVICE)
    right, right_grad = truth(hidden[ends], weight, targets[ends], torch.ones(4, device=DEVICE), torch.float64)
    leaf = hidden.requires_grad_()
    with tuning.override(implementation=implementation, rows=n, columns=v - 7):
        got = linear_logprobs(leaf, weight, targets, backend=backend).logprobs
    assert_within(got[ends], right, LOGPROB_TOLERANCES[BF16, 4])
    grad = torch.autograd.grad(got.sum(), leaf)[0]
    assert_within(grad[ends], right_grad, 2.0**-6 * float(right_grad.abs().max()))


def every_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, backend: str) -> tuple[Any, ...]:
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
    logits = h @ w.T
    fourth = logits_ppo_loss(logits, targets, *args, **options)
    critic = value_loss(values, values.detach() + 0.3, returns.view(n), mask, backend=backend)
    ids, ref = torch.arange(n, device=DEVICE) % 7 - 1, torch.full((6,), -8.0 * n / 7, device=DEVICE)
    pairs = linear_dpo_loss(h, w, targets, ids, ref, backend=backend)
    losses = [x.loss for x in (first, second, third, fourth, critic, pairs)]
    losses.append(linear_kl(h, (hidden + 0.1).detach(), weight.detach(), backend=backend).mean())
    losses.append(selective(logits, targets, mask=mask, entropy_requires_grad=True, backend=backend).logprobs.mean())
    return *losses, *torch.autograd.grad(torch.stack(losses).sum(), (h, w, values))


@over_paths
def test_two_runs_are_equal_to_the_last_bit(implementation: str, backend: str) -> None:
    hidden, weight, targets = inputs(*sized((513, 256, 50257), FEW), BF16)
    with tuning.override(implementation=implementation, **SMALL_TILES):
        first, second = (every_loss(hidden, weight, targets, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(x.isfinite().all() for x in first)


@over_paths
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_rounds_operands_alone(dtype: str, implementation: str, backend: str) -> None:
    hidden, weight, targets = inputs(*sized((130, 256, 32000), FEW), FP32)

    def run(cast: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        operands = leaf.to(cast), head.to(cast)
        out = linear_logprobs(*operands, targets, entropy_requires_grad=True, backend=backend)
        assert out.entropy is not None
        grads = torch.autograd.grad((out.logprobs + out.entropy).sum(), (leaf, head))
        return out.logprobs, out.entropy, *grads

    with tuning.override(implementation=implementation):
        cast = run(HALF[dtype])
        with torch.autocast(DEVICE.type, dtype=HALF[dtype]):
            inside = run(FP32)
    assert all(torch.equal(a, b) for a, b in zip(cast, inside, strict=True))


@over_backends
def test_a_step_compiles_as_one_graph(backend: str) -> None:
    n, d, v = sized((130, 128, 32000), FEW)
    hidden, weight, targets = inputs(n, d, v, BF16)
    mask, old = torch.ones(n, device=DEVICE), torch.full((n,), -8.0, device=DEVICE)
    ids, ref = torch.arange(n, device=DEVICE) % 4, torch.full((4,), -8.0 * n / 4, device=DEVICE)
    rewards = normal(2, n // 2)

    def step(h: torch.Tensor) -> torch.Tensor:
        gains = masked_whiten(
            gae(rewards, rewards + 0.1, mask.view(2, -1), backend=backend).advantages, mask.view(2, -1)
        )
        args = (targets, old, gains.view(n), mask)
        losses = [
            linear_ppo_loss(h, weight, *args, entropy_coef=0.01, backend=backend).loss,
            linear_dpo_loss(h, weight, targets, ids, ref, backend=backend).loss,
            linear_logprobs(h, weight, targets, backend=backend).logprobs.mean(),
            linear_kl(h, hidden, weight, backend=backend).mean(),
            logits_ppo_loss(h.float() @ weight.float().T, *args, backend=backend).loss,
            value_loss(h.float().mean(1), old, old + 7.5, mask, backend=backend).loss,
        ]
        return torch.stack(losses).sum()

    results = []
    # Dry, the graph is traced and not compiled: a C++ compiler would take longer than all other tests here
    for run in (step, torch.compile(step, fullgraph=True, backend="inductor" if CARD else "aot_eager")):
        leaf = hidden.clone().requires_grad_()
        loss = run(leaf)
        assert loss.dtype == FP32
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert_within(results[1][0], results[0][0], 1e-5 * max(1.0, float(results[0][0].abs())))
    assert_within(results[1][1], results[0][1], 2.0**-7 * float(results[0][1].abs().max()))
