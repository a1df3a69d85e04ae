"""linear_ppo_loss's products with the head: how many, of how many rows, and that the gradient is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard_kernels import linear_logprobs, linear_ppo_loss, ppo_loss
from onecard_kernels.logprob import matmul, tuning
from tests.closeness import assert_within
from tests.kernels import oracle
from tests.kernels.linear_ppo_material import EPS, HEAD, LEAVES, D, V, batch, chunked_only, fused, use_small_tiles


@pytest.fixture(autouse=True, params=["chunked", "low_memory"])
def small_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_small_tiles(request.param):
        yield request.param


def spy_on(name: str, calls: list[tuple[str, int]]) -> Any:
    original = getattr(matmul, name)

    def spy(first: Tensor, *rest: Any) -> Any:
        calls.append((name, first.shape[0]))
        return original(first, *rest)

    return spy


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(which product, its rows) of every product with the head."""
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("project", "project_back", "outer"):
            patch.setattr(matmul, name, spy_on(name, calls))
        yield calls


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ((), ["project"]),
        (("hidden",), ["project", "project_back"]),
        (("hidden", "weight"), ["project", "project_back", "outer"]),
        (("weight",), ["project", "outer"]),
        (LEAVES, ["project", "project_back", "outer"]),
        (("bias",), ["project"]),
    ],
)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@chunked_only
def test_number_of_products(small_tiles: str, train: tuple[str, ...], names: list[str], entropy_coef: float) -> None:
    """Two with a frozen head, three with a trained one, with the entropy bonus in them; none in the backward."""
    data = batch()
    for name in train:
        data[name].requires_grad_()
    valid = int(data["mask"].sum())
    with tuning.override(implementation="chunked", rows=1000):
        with counted() as forward:
            loss = fused(data, entropy_coef=entropy_coef).loss
        assert [name for name, _ in forward] == names
        assert forward[0] == ("project", valid)
        with counted() as backward:
            if train:
                loss.backward()
        assert backward == []
        with counted() as silent, torch.no_grad():
            fused(data, entropy_coef=entropy_coef)
        assert silent == [("project", valid)]


def test_low_memory_adds_one_product_for_the_entropy() -> None:
    data = batch()
    data["hidden"].requires_grad_()
    for entropy_coef, names in ((0.0, ["project", "project_back"]), (0.3, ["project", "project_back", "project_back"])):
        with tuning.override(implementation="low_memory", rows=19, columns=66), counted() as calls:
            fused(data, entropy_coef=entropy_coef)
        assert [name for name, _ in calls] == names * 2  # two tiles


def clipped_batch(clipped: int, tokens: int = 32) -> dict[str, Tensor]:
    """The first ones have a ratio of 2 and a positive advantage: no gradient. They are mixed with the others."""
    hidden, weight, targets = torch.randn(tokens, D), torch.randn(V, D) * 0.5, torch.randint(1, V, (tokens,))
    idle = torch.zeros(tokens, dtype=torch.bool)
    idle[torch.randperm(tokens)[:clipped]] = True
    logp = linear_logprobs(hidden, weight, targets, **HEAD).logprobs
    old = logp - torch.where(idle, 0.7, 0.05)
    advantages = torch.rand(tokens) + 0.5
    return {"hidden": hidden, "weight": weight, "targets": targets, "old_logprobs": old, "advantages": advantages}


@pytest.mark.parametrize(
    ("clipped", "rows"),
    [
        (0, [32]),
        (1, [32]),
        (3, [32]),  # less than an eighth: moving rows would not pay
        (4, [28]),
        (16, [16]),
        (31, [1]),
        (32, []),
    ],
)
@pytest.mark.parametrize("entropy", [False, True])
@chunked_only
def test_tokens_without_a_coefficient_skip_the_second_product(
    small_tiles: str, clipped: int, rows: list[int], entropy: bool
) -> None:
    """With an entropy bonus every token has a coefficient. The gradient is the same either way."""
    data = clipped_batch(clipped)
    kw = {**HEAD, "entropy_coef": 0.1 if entropy else 0.0, "backend": "torch"}
    ones = torch.ones(32)

    def go(worth: float) -> tuple[Tensor, list[int]]:
        leaf = data["hidden"].clone().requires_grad_()
        with tuning.override(implementation="chunked", rows=1000), pytest.MonkeyPatch.context() as patch:
            patch.setattr("onecard_kernels.ppo.linear.LEAST_SHARE_TO_SKIP", worth)
            with counted() as calls:
                loss = linear_ppo_loss(**{**data, "hidden": leaf}, mask=ones, **kw).loss
        return torch.autograd.grad(loss, leaf)[0], [n for name, n in calls if name == "project_back"]

    gradient, back = go(1 / 8)
    assert back == ([32] if entropy else rows)
    whole, _ = go(2.0)  # never worth it
    assert_within(gradient, whole, 4 * EPS * float(whole.abs().max()))
    mine, theirs = (x.abs().sum(1) == 0.0 for x in (gradient, whole))
    assert int(mine.sum()) == (0 if entropy else clipped)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("idle", "more", "rows"),
    [
        ("advantages", {}, 8),
        ("advantages", {"entropy_coef": 0.1}, 32),
        ("advantages", {"kl_coef": 0.1}, 32),
        ("weights", {}, 8),
        ("weights", {"entropy_coef": 0.1, "kl_coef": 0.1}, 8),
    ],
)
def test_tokens_without_advantage_or_weight_cost_one_product(
    small_tiles: str, idle: str, more: dict[str, Any], rows: int
) -> None:
    """They are known before: whatever the plan, their rows take part in the first product alone."""
    data = clipped_batch(0)
    quiet = torch.ones(32, dtype=torch.bool)
    quiet[torch.randperm(32)[:8]] = False
    data["weights"] = torch.rand(32) + 0.5
    data["ref_logprobs"] = data["old_logprobs"] - 0.3
    data[idle] = data[idle].masked_fill(quiet, 0.0)
    leaf = data["hidden"].clone().requires_grad_()
    with counted() as calls:
        got = linear_ppo_loss(**{**data, "hidden": leaf}, mask=torch.ones(32), **HEAD, **more)
    tiles = 1 if small_tiles == "chunked" else 4  # 131 columns by 40
    back = sum(n for name, n in calls if name == "project_back")
    assert back == rows * tiles * (2 if small_tiles == "low_memory" and "entropy_coef" in more else 1)
    assert sum(n for name, n in calls if name == "project") == 32 * tiles
    gradient = torch.autograd.grad(got.loss, leaf)[0]
    policy = linear_logprobs(leaf, data["weight"], data["targets"], entropy_requires_grad=True, **HEAD)
    rest = {n: data[n] for n in ("old_logprobs", "advantages", "weights", "ref_logprobs")}
    whole = ppo_loss(policy.logprobs, **rest, mask=torch.ones(32), entropy=policy.entropy, **more)
    assert_within(got.loss, whole.loss, 16 * EPS * max(1.0, abs(float(whole.loss.detach()))))
    for key, value in whole.metrics.items():
        assert_within(got.metrics[key], value, 16 * EPS * max(1.0, abs(float(value))), key)
    expected = torch.autograd.grad(whole.loss, leaf)[0]
    assert_within(gradient, expected, 16 * EPS * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@chunked_only
def test_moved_rows_over_several_chunks_and_blocks(small_tiles: str, entropy_coef: float) -> None:
    """Chunks that are idle, half idle and busy; blocks of three rows inside each; some tokens masked."""
    data = clipped_batch(20, 40)
    data["mask"] = torch.arange(40) % 7 != 2
    data["weights"] = torch.where(torch.arange(40) % 3 == 0, 0.0, 1.0)  # idle for the entropy bonus too
    leaves = {**data, "hidden": data["hidden"].clone().requires_grad_()}
    got = torch.autograd.grad(linear_ppo_loss(**leaves, **HEAD, entropy_coef=entropy_coef).loss, leaves["hidden"])[0]
    policy = oracle.linear_logprobs(
        leaves["hidden"].double(), data["weight"].double(), data["targets"], entropy_requires_grad=True, **HEAD
    )
    rest = (data["old_logprobs"], data["advantages"], data["mask"])
    loss = ppo_loss(
        policy.logprobs, *rest, entropy=policy.entropy, entropy_coef=entropy_coef, weights=data["weights"]
    ).loss
    truth = torch.autograd.grad(loss, leaves["hidden"])[0]
    assert_within(got, truth, 2e-6 * max(1.0, float(truth.abs().max())))


def test_no_valid_token_and_no_token() -> None:
    for n in (0, 5):
        hidden, weight = torch.randn(n, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        tokens = (torch.zeros(n, dtype=torch.long), torch.zeros(n), torch.zeros(n), torch.zeros(n))
        out = linear_ppo_loss(hidden, weight, *tokens, entropy_coef=0.1)
        assert out.loss == 0.0
        assert all(value == 0.0 for value in out.metrics.values())
        by_hidden, by_weight = torch.autograd.grad(out.loss, (hidden, weight))
        assert torch.equal(by_hidden, torch.zeros(n, D))
        assert torch.equal(by_weight, torch.zeros(V, D))
