"""docs/kernels.md: what it says of tables, names, limits and products is so in the library."""

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


def test_the_table_of_plans_is_the_code_s() -> None:
    for device, c in tuning.TABLE.items():
        line = (
            f"| {device} | {c.default} | {c.row_bytes >> 20} MiB of logits, {c.least_rows} to {c.most_rows} rows "
            f"| {c.tile_rows} x {c.tile_columns} |"
        )
        assert line in PAGE


def test_blocks_of_numbers_are_the_renderer_s() -> None:
    from benchmarks.render import updated
    from benchmarks.suite import BENCHMARKS

    names = re.findall(r"<!-- benchmark:(\w+) -->", PAGE)
    assert len(set(names)) == len(names) > 0
    assert set(names) <= set(BENCHMARKS)
    filled = updated(PAGE, {name: f"numbers of {name}" for name in names})
    assert all(f"numbers of {name}\n<!-- /benchmark -->" in filled for name in names)
    assert "```python" in updated(filled, {names[-1]: ""})


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_it_is_right(reentrant: bool) -> None:
    names, _ = tokens(torch.float32)
    hidden, rest = names["hidden"], (names["weight"].detach(), names["targets"])

    def loss(h: Tensor) -> Tensor:
        return k.linear_logprobs(h, *rest).logprobs.square().sum()

    inside, outside = checkpoint(loss, hidden, use_reentrant=reentrant), loss(hidden)
    inside.backward()
    (expected,) = torch.autograd.grad(outside, hidden)
    assert torch.equal(hidden.grad, expected)


class Products(TorchDispatchMode):
    """Operations of all matrix products, inside of operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = OPDEFS.get(func._schema.name)
        if operator is not None:
            with self:
                return operator._init_fn(*args, **(kwargs or {}))
        if "mm" in func._schema.name:
            a, b = args[-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("what", "trained", "expected"),
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
def test_the_table_of_products(what: str, trained: bool, expected: int) -> None:
    n, d, v = 40, 24, 301
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=trained)
    targets, ones = torch.randint(v, (n,)), torch.ones(n)

    def ppo(advantages: Tensor) -> Tensor:
        old = k.linear_logprobs(hidden.detach(), weight.detach(), targets).logprobs if what == "ppo" else ones * -90
        return k.linear_ppo_loss(
            hidden, weight, targets, old, advantages, ones, entropy_coef=0.1 * (what == "ppo")
        ).loss

    def kl() -> Tensor:
        return k.linear_kl(hidden, hidden.detach() + 1, weight).sum()

    steps: dict[str, Callable[[], Any]] = {
        "logprobs": lambda: k.linear_logprobs(hidden, weight, targets).logprobs.sum().backward(),
        "entropy": lambda: (
            sum(k.linear_logprobs(hidden, weight, targets, entropy_requires_grad=True)[:2]).sum().backward()
        ),
        "ppo": lambda: ppo(ones).backward(),
        "clipped ppo": lambda: ppo(ones).backward(),
        "kl": lambda: kl().backward(),
        "no gradient": lambda: k.linear_logprobs(
            hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True
        ),
        "kl, no gradient": kl,
    }
    with torch.set_grad_enabled("no gradient" not in what), Products() as found:
        steps[what]()
    extra = what == "ppo"  # for the old log-probabilities
    assert found.operations / (2 * n * d * v) == expected + extra
