"""gae, group_advantages and masked_whiten: by hand, against slow loops, and the identities between them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from onecard_kernels import gae, group_advantages, masked_whiten
from onecard_kernels.advantages import torch_gae
from tests.closeness import assert_like_eager
from tests.kernels import oracle

NAN = float("nan")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# gamma = lam = 1/2, rewards 1, 2, 3, values 1/2, 1, 3/2.
#   to be continued at a value of 4:      deltas 1 + 1/2 - 1/2 = 1,  2 + 3/4 - 1 = 7/4,  3 + 2 - 3/2 = 7/2
#     A = 7/2,  7/4 + 7/8 = 21/8,  1 + 21/32 = 53/32
#   ended:                                last delta 3 - 3/2 = 3/2
#     A = 3/2,  7/4 + 3/8 = 17/8,  1 + 17/32 = 49/32
BY_HAND = [(4.0, [53 / 32, 21 / 8, 7 / 2]), (0.0, [49 / 32, 17 / 8, 3 / 2]), (None, [49 / 32, 17 / 8, 3 / 2])]
VALUES = [0.5, 1.0, 1.5]


@pytest.mark.parametrize(("last", "expected"), BY_HAND)
@pytest.mark.parametrize(
    "mask", [[1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1, 0]], ids=lambda m: "".join(map(str, m))
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
def test_gae_by_hand_with_gaps(
    mask: list[int], mask_dtype: torch.dtype, last: float | None, expected: list[float]
) -> None:
    """Masked positions are stepped over: the valid ones get what they get without them. All numbers are exact."""
    valid = torch.tensor([mask]).bool()
    rewards, values = (
        torch.full(valid.shape, NAN).masked_scatter(valid, torch.tensor(x)) for x in ([1.0, 2.0, 3.0], VALUES)
    )
    last_values = None if last is None else torch.tensor([last])
    got = gae(rewards, values, valid.to(mask_dtype), gamma=0.5, lam=0.5, last_values=last_values)
    assert got.advantages.dtype == got.returns.dtype == torch.float32
    assert got.advantages[valid].tolist() == expected
    assert got.returns[valid].tolist() == [a + v for a, v in zip(expected, VALUES, strict=True)]
    for x in got:
        assert torch.equal(x[~valid], torch.zeros(len(mask) - 3))


def loop_gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float, last: torch.Tensor
) -> torch.Tensor:
    """Python floats, one row and one valid position after the other, from the sum's definition."""
    out = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        places = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r = [rewards[b, t].item() for t in places]
        v = [values[b, t].item() for t in places] + [last[b].item()]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(places))]
        for i, t in enumerate(places):
            out[b, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(places)))
    return out


@pytest.mark.parametrize("seed", range(12))
def test_gae_equals_the_loop(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    b, t = (int(torch.randint(1, 8, (), generator=rng)) for _ in range(2))
    gamma, lam = torch.rand(2, generator=rng).tolist()
    mask = torch.rand(b, t, generator=rng) < [0.2, 0.5, 0.8, 1.0][seed % 4]
    rewards, values, last = rand(b, t), rand(b, t), rand(b)
    junk = torch.where(mask, 0.0, NAN)
    got = gae(rewards + junk, values + junk, mask, gamma=gamma, lam=lam, last_values=last)
    truth = loop_gae(rewards, values, mask, gamma, lam, last)
    assert got.advantages.dtype == torch.float64
    torch.testing.assert_close(got.advantages, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.returns, truth + torch.where(mask, values, 0.0), rtol=1e-12, atol=1e-13)


def assert_like_the_loop(b: int, t: int, density: float, dtype: torch.dtype, **options: Any) -> None:
    """The torch backend knows no steps: at most twice as wrong as the loop over positions in the same dtype."""
    mask = torch.rand(b, t) < density
    rewards, values = (torch.randn(b, t, dtype=dtype).masked_fill(~mask, NAN) for _ in range(2))
    last = torch.randn(b, dtype=dtype)
    wide = [x.double() for x in (rewards, values, last)]
    truth = oracle.gae(*wide[:2], mask, last_values=wide[2], **options)
    eager = oracle.gae(rewards, values, mask, last_values=last, **options)
    got = gae(rewards, values, mask, last_values=last, backend="torch", **options)
    for name in ("advantages", "returns"):
        assert_like_eager(getattr(got, name), getattr(eager, name), getattr(truth, name), name)


@pytest.mark.parametrize("length", [*range(1, 20), 31, 32, 33, 63, 64, 65, 66, 255, 256, 300])
def test_gae_of_any_length(length: int) -> None:
    """On both sides of one window, two, and many."""
    for density in (0.1, 0.5, 1.0):
        assert_like_the_loop(3, length, density, torch.float32, gamma=1.0, lam=0.9)


@pytest.mark.parametrize("window", [1, 2, 4, 16, 64])
def test_gae_in_any_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_gae, "_window", lambda length: window)
    assert_like_the_loop(3, 29, 0.6, torch.float64, gamma=0.99, lam=0.9)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.5, 0.5)])
def test_gae_of_long_rows_keeps_fp32_s_digits(gamma: float, lam: float) -> None:
    for density in (0.5, 1.0):
        assert_like_the_loop(2, 4096, density, torch.float32, gamma=gamma, lam=lam)


@pytest.mark.parametrize("length", [1, 2, 100, 1024, 4096, 100_000])
def test_gae_takes_few_steps(length: int) -> None:
    """No more windows than positions in one."""
    assert length <= torch_gae._window(length) ** 2 < 8 * length


def test_gae_at_lam_one_and_zero() -> None:
    """lam = 1, gamma = 1: return minus value, so that `returns` forgets the values; lam = 0: the one-step error."""
    rewards, values = torch.randn(2, 4, 6, dtype=torch.float64)
    last, mask = torch.randn(4, dtype=torch.float64), torch.ones(4, 6)
    monte_carlo = gae(rewards, values, mask, gamma=1.0, lam=1.0, last_values=last)
    returns = rewards.flip(1).cumsum(1).flip(1) + last.unsqueeze(1)
    torch.testing.assert_close(monte_carlo.returns, returns)
    torch.testing.assert_close(monte_carlo.advantages, returns - values)
    one_step = gae(rewards, values, mask, gamma=0.9, lam=0.0, last_values=last)
    following = torch.cat([values[:, 1:], last.unsqueeze(1)], 1)
    torch.testing.assert_close(one_step.advantages, rewards + 0.9 * following - values)


def test_gae_defaults_are_gamma_one_and_lam_95_percent() -> None:
    # deltas: 0 + 1 - 0 = 1, 1 - 1 = 0 -> A = 1; 2nd: r 3, last delta 3 - 1 = 2, A_0 = 1 + 0.95 * 2
    got = gae(f64(0.0, 3.0).view(1, 2), f64(0.0, 1.0).view(1, 2), torch.ones(1, 2))
    torch.testing.assert_close(got.advantages, f64(2.9, 2.0).view(1, 2))


def test_gae_rows_are_independent() -> None:
    rewards, values = torch.randn(2, 3, 5)
    mask, last = torch.rand(3, 5) < 0.6, torch.randn(3)
    mask[1] = False
    last[1] = NAN  # the value after nothing
    whole = gae(rewards, values, mask, last_values=last)
    for i in range(3):
        row = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], last_values=last[i : i + 1])
        assert torch.equal(row.advantages[0], whole.advantages[i])
        assert torch.equal(row.returns[0], whole.returns[i])
    assert torch.equal(whole.advantages[1], torch.zeros(5))
    assert torch.equal(whole.returns[1], torch.zeros(5))


def test_results_are_detached_and_fp32() -> None:
    low = torch.randn(2, 6).bfloat16().requires_grad_()
    last = torch.randn(2, requires_grad=True)
    mask = torch.ones(2, 6)
    results = [
        *gae(low, low, mask, last_values=last),
        *(group_advantages(low[0], group_size=3, kind=kind) for kind in ("grpo", "grpo_no_std", "rloo")),
        masked_whiten(low, mask),
    ]
    for x in results:
        assert x.dtype == torch.float32
        assert not x.requires_grad
    wide = low.detach().double()
    args = [low.detach(), low.detach(), last.detach()]
    for i in range(3):
        r, v, l = (x.double() if i == j else x for j, x in enumerate(args))
        assert gae(r, v, mask, last_values=l).advantages.dtype == torch.float64
    assert group_advantages(wide[0], group_size=2).dtype == torch.float64
    assert masked_whiten(wide, mask).dtype == torch.float64


# Groups 1, 3, 5 (mean 3, unbiased std sqrt((4 + 0 + 4) / 2) = 2) and 7, 7, 7 (std 0).
GROUPS = [
    ({"kind": "grpo", "eps": 0.5}, [-0.8, 0.0, 0.8, 0.0, 0.0, 0.0]),
    ({}, [-2 / 2.0001, 0.0, 2 / 2.0001, 0.0, 0.0, 0.0]),
    ({"kind": "grpo_no_std"}, [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]),
    ({"kind": "rloo"}, [1 - 4.0, 3 - 3.0, 5 - 2.0, 0.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("options", "expected"), GROUPS)
def test_groups_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    got = group_advantages(f64(1.0, 3.0, 5.0, 7.0, 7.0, 7.0), group_size=3, **options)
    torch.testing.assert_close(got, f64(*expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_rloo_is_the_score_minus_the_others_mean(size: int) -> None:
    scores = torch.randn(12, dtype=torch.float64)
    others = [
        sum(scores[j].item() for j in range(12) if j // size == i // size and j != i) / (size - 1) for i in range(12)
    ]
    got = group_advantages(scores, group_size=size, kind="rloo")
    torch.testing.assert_close(got, scores - f64(*others))
    no_std = group_advantages(scores, group_size=size, kind="grpo_no_std")
    torch.testing.assert_close(got, size / (size - 1) * no_std)


def test_groups_of_one_and_no_groups() -> None:
    assert torch.equal(group_advantages(torch.randn(3), group_size=1, kind="grpo_no_std"), torch.zeros(3))
    for kind in ("grpo", "grpo_no_std", "rloo"):
        assert group_advantages(torch.zeros(0), group_size=4, kind=kind).shape == (0,)


# 1, 3, 5 on the diagonal: mean 3, squares 4 + 0 + 4. Unbiased variance 4, biased 8/3.
WHITENED = [
    ({}, [-1.0, 0.0, 1.0]),
    ({"shift_mean": False}, [2.0, 3.0, 4.0]),
    ({"unbiased": False}, [-2 / math.sqrt(8 / 3), 0.0, 2 / math.sqrt(8 / 3)]),
    ({"eps": 5.0}, [-2 / 3, 0.0, 2 / 3]),
    ({"eps": 5.0, "shift_mean": False}, [3 - 2 / 3, 3.0, 3 + 2 / 3]),
]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long])
@pytest.mark.parametrize(("options", "expected"), WHITENED)
def test_whitening_by_hand(options: dict[str, Any], expected: list[float], mask_dtype: torch.dtype) -> None:
    x = torch.full((3, 3), NAN, dtype=torch.float64).fill_diagonal_(0.0) + torch.diag(f64(1.0, 3.0, 5.0))
    got = masked_whiten(x, torch.eye(3).to(mask_dtype), **options)
    torch.testing.assert_close(got, torch.diag(f64(*expected)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_the_loop(seed: int, unbiased: bool, shift_mean: bool) -> None:
    torch.manual_seed(seed)
    shape = torch.randint(1, 7, (seed % 3 + 1,)).tolist()
    x, mask = torch.randn(shape, dtype=torch.float64) * 3 + 5, torch.rand(shape) < [0.3, 0.7, 1.0][seed % 3]
    valid = [v for v, m in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]
    mean = sum(valid) / max(len(valid), 1)
    variance = sum((v - mean) ** 2 for v in valid) / max(len(valid) - unbiased, 1)
    expected = torch.zeros(shape, dtype=torch.float64).flatten()
    for i, (v, m) in enumerate(zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True)):
        if m:
            expected[i] = (v - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    got = masked_whiten(x.masked_fill(~mask, NAN), mask, shift_mean=shift_mean, unbiased=unbiased)
    torch.testing.assert_close(got, expected.view(shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_whitening_one_entry_and_none(unbiased: bool) -> None:
    x = torch.tensor([[NAN, 7.0], [NAN, NAN]])
    one, none = torch.tensor([[0, 1], [0, 0]]), torch.zeros(2, 2)
    assert torch.equal(masked_whiten(x, one, unbiased=unbiased), torch.zeros(2, 2))
    assert torch.equal(masked_whiten(x, one, unbiased=unbiased, shift_mean=False), torch.where(one.bool(), x, 0.0))
    for shift_mean in (True, False):
        assert torch.equal(masked_whiten(x, none, unbiased=unbiased, shift_mean=shift_mean), torch.zeros(2, 2))


def test_whitening_keeps_the_digits_of_a_far_mean() -> None:
    """Variance as mean of squares minus square of mean would be noise here."""
    got = masked_whiten(torch.tensor([1e4 - 2, 1e4, 1e4 + 2]), torch.ones(3))
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-4, atol=1e-4)
