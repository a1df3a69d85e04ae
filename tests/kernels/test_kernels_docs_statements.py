"""What docs/kernels.md says of tuning, checkpointing and matrix products is true of the library."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import onecard_kernels as k
from onecard_kernels.logprob import tuning
from tests.kernels.kernels_docs import PAGE, tokens


def test_tuning_table_matches_the_page() -> None:
    for device, choice in tuning.TABLE.items():
        rows = f"{choice.row_bytes >> 20} MiB of logits, {choice.least_rows} to {choice.most_rows} rows"
        line = f"| {device} | {choice.default} | {rows} | {choice.tile_rows} x {choice.tile_columns} |"
        assert line in PAGE


def test_benchmark_blocks_of_the_page_can_be_rendered() -> None:
    from benchmarks.render import updated
    from benchmarks.suite import BENCHMARKS

    names = re.findall(r"<!-- benchmark:(\w+) -->", PAGE)
    assert len(set(names)) == len(names) > 0
    assert set(names) <= set(BENCHMARKS)
    filled = updated(PAGE, {name: f"numbers of {name}" for name in names})
    assert all(f"numbers of {name}\n<!-- /benchmark -->" in filled for name in names)
    assert "```python" in updated(filled, {names[-1]: ""})  # code outside of the blocks stays


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_gradient_inside_a_checkpoint_is_the_same(reentrant: bool) -> None:
    names, _ = tokens(torch.float32)
    hidden, weight, targets = names["hidden"], names["weight"].detach(), names["targets"]

    def loss(h: Tensor) -> Tensor:
        return k.linear_logprobs(h, weight, targets).logprobs.square().sum()

    inside, outside = checkpoint(loss, hidden, use_reentrant=reentrant), loss(hidden)
    inside.backward()
    (expected,) = torch.autograd.grad(outside, hidden)
    assert torch.equal(hidden.grad, expected)


class MatmulFlops(TorchDispatchMode):
    """Counts the FLOPs of all matrix products, also those inside the library's custom operators."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        custom_operator = OPDEFS.get(func._schema.name)
        if custom_operator is not None:
            with self:
                return custom_operator._init_fn(*args, **(kwargs or {}))
        if "mm" in func._schema.name:
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("what", "trained_head", "products"),
    [
        ("logprobs", False, 2),
        ("logprobs", True, 4),
        ("entropy", False, 3),
        ("entropy", True, 4),
        ("ppo", False, 2),
        ("ppo", True, 3),
        ("clipped ppo", False, 1),
        ("kl", False, 3),
        ("no gradient", True, 1),
        ("kl, no gradient", False, 2),
    ],
)
def test_number_of_matrix_products(what: str, trained_head: bool, products: int) -> None:
    """Forward and backward together, each product of 2 N D V FLOPs."""
    n, d, v = 40, 24, 301
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=trained_head)
    targets, ones = torch.randint(v, (n,)), torch.ones(n)
    sampled_logprobs = k.linear_logprobs(hidden.detach(), weight.detach(), targets).logprobs

    def ppo(old_logprobs: Tensor, entropy_coef: float) -> Tensor:
        return k.linear_ppo_loss(hidden, weight, targets, old_logprobs, ones, ones, entropy_coef=entropy_coef).loss

    def kl() -> Tensor:
        return k.linear_kl(hidden, hidden.detach() + 1, weight).sum()

    steps: dict[str, Callable[[], Any]] = {
        "logprobs": lambda: k.linear_logprobs(hidden, weight, targets).logprobs.sum().backward(),
        "entropy": lambda: (
            sum(k.linear_logprobs(hidden, weight, targets, entropy_requires_grad=True)[:2]).sum().backward()
        ),
        "ppo": lambda: ppo(sampled_logprobs, entropy_coef=0.1).backward(),
        "clipped ppo": lambda: ppo(ones * -90, entropy_coef=0.0).backward(),  # all tokens clipped: no gradient
        "kl": lambda: kl().backward(),
        "no gradient": lambda: k.linear_logprobs(
            hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True
        ),
        "kl, no gradient": kl,
    }
    with torch.set_grad_enabled("no gradient" not in what), MatmulFlops() as counted:
        steps[what]()
    assert counted.flops / (2 * n * d * v) == products
