"""The Triton pass over tiles of products with the head, against its equation in fp64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from onecard_kernels.logprob import online_softmax as slots
from onecard_kernels.logprob.online_softmax import TileOutputs
from onecard_kernels.records import Head
from tests.closeness import assert_within

triton_exp = pytest.importorskip("onecard_kernels.logprob.triton_exp", reason="triton is not installed")

ROWS, V = 5, 1031  # a prime above one block of the kernel's smallest size
NAN, INF = float("nan"), float("inf")
CAPPED = {"bias": torch.linspace(-1, 1, V), "logit_scale": 0.8, "softcap": 3.0, "temperature": 1.3}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "everything": {**CAPPED, "forbidden": torch.arange(V) % 7 == 3},
    "bias in bf16": {"bias": torch.linspace(-1, 1, V).bfloat16()},
}


def fresh(rows: int) -> torch.Tensor:
    state = torch.full((slots.SLOTS, rows), NAN)  # what is never written is never read
    for slot in (slots.OFF, slots.MOMENT, slots.SQUARE):
        state[slot] = 0.0
    state[slots.SHIFT] = state[slots.TARGET] = -INF
    state[slots.SLOPE] = 1.0
    return state


def products(std: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, V) * std, torch.tensor([0, V - 1, 16, 500, 1])


def sweep(
    z: torch.Tensor,
    y: torch.Tensor,
    head: Head,
    edges: list[int],
    dtype: torch.dtype | None,
    *,
    spread: bool = True,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tiles; what they left in both outputs, brought to the last shift by the factors that the state gives."""
    state = fresh(len(z)) if state is None else state
    outs: list[torch.Tensor] = []
    spreads: list[torch.Tensor] = []
    for start, stop in pairwise(edges):
        tile = z[:, start:stop].clone()
        out = tile if dtype is None else torch.full(tile.shape, NAN, dtype=dtype)
        beside = torch.full(tile.shape, NAN, dtype=dtype or torch.float32) if spread else None
        part = head.columns(slice(start, stop))
        triton_exp.exp_tile(tile, out, beside, y, start, state, part, TileOutputs(exponentials=True))
        factor = state[slots.RESCALE].double().unsqueeze(1)
        if beside is not None:
            spreads = [(s + e * factor.log()) * factor for s, e in zip(spreads, outs, strict=True)]
            spreads.append(beside.double())
        outs = [*(e * factor for e in outs), out.double()]
    return state, torch.cat(outs, 1), torch.cat(spreads, 1) if spread else torch.empty(0)


def equation(z: torch.Tensor, y: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformed logits in fp64, and what the softcap multiplies gradients by."""
    raw = z.double().requires_grad_()
    transformed = head.transform(raw)
    slope = torch.autograd.grad(transformed[transformed.isfinite()].sum(), raw)[0]
    return transformed.detach(), slope / head.factor


def check(z: torch.Tensor, y: torch.Tensor, head: Head, state: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The state's statistics against fp64; returns the state in fp64."""
    true, slope = equation(z, y, head)
    s = state.double()
    at_target = s[slots.TARGET] - s[slots.SHIFT]
    total = s[slots.OFF] + at_target.exp()
    at = y.unsqueeze(1)
    logp = true.log_softmax(1)
    assert_within(at_target - total.log(), logp.gather(1, at).squeeze(1), tolerance, "logp")
    p = logp.exp()
    entropy = total.log() - (s[slots.MOMENT] + at_target.exp() * at_target.clamp(min=-1e4)) / total
    assert_within(entropy, -(p * logp.clamp(min=-1e4)).sum(1), tolerance, "entropy")
    lssp = (s[slots.SQUARE] + (2 * at_target).exp()).log() - 2 * total.log()
    assert_within(lssp, torch.logsumexp(2 * logp, 1), 4 * tolerance, "log sum p^2")
    # 1 - p_y, relative to itself: it is a sum of its own
    off = (p.scatter(1, at, 0.0)).sum(1)
    assert_within(s[slots.OFF] / total / off, torch.ones_like(off), 1e-5, "1 - p_y")
    kept = head.forbidden is None or ~head.forbidden[y]
    wanted = torch.where(torch.as_tensor(kept), slope.gather(1, at).squeeze(1), s[slots.SLOPE])
    assert_within(s[slots.SLOPE], wanted, 1e-6, "slope at the target")
    return s


@pytest.mark.parametrize("edges", [[0, V], [0, 400, 800, V], [0, 1, 17, V]], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_the_state_is_the_softmax(name: str, edges: list[int]) -> None:
    z, y = products()
    head = Head(**HEADS[name])
    state, out, spread = sweep(z, y, head, edges, None)
    s = check(z, y, head, state, 1e-5)
    true, slope = equation(z, y, head)
    d = true - s[slots.SHIFT].unsqueeze(1)
    e = d.exp().scatter(1, y.unsqueeze(1), 0.0) * slope
    scale = float(d.exp().max())
    assert_within(out, e, 1e-5 * scale, "e")
    assert_within(spread, e * d.clamp(min=-1e4), 1e-4 * scale, "spread")


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-11)])
def test_low_precision_outputs(dtype: torch.dtype, share: float) -> None:
    """One ulp in bf16, which the interpreter truncates; and no less of the small ones than the dtype can hold."""
    z, y = products()
    state, out, spread = sweep(z, y, Head(), [0, V], dtype)
    s = check(z, y, Head(), state, 1e-5)
    d = z.double() - s[slots.SHIFT].unsqueeze(1)
    e = d.exp().scatter(1, y.unsqueeze(1), 0.0)
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0
    assert bool(((out - e).abs() <= e * share * 1.01 + tiny).all())
    assert bool(((spread - e * d).abs() <= (e * d).abs() * share * 1.01 + tiny).all())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peak", [3, V - 2])
@pytest.mark.parametrize("height", [90.0, 3000.0])
def test_a_peak_after_the_first_block(height: float, peak: int, dtype: torch.dtype | None) -> None:
    """Far above what the shift was picked from, exp would overflow."""
    z, y = products(1.0)
    z[:, peak] += height
    for edges in ([0, V], [0, 600, V]):
        state, out, _ = sweep(z, y, Head(), edges, dtype)
        assert out.isfinite().all()
        s = state.double()
        assert bool((s[slots.SHIFT] <= z.amax(1) + 1e-3).all())
        d = z.double() - s[slots.SHIFT].unsqueeze(1)
        assert_within(out[:, peak], d[:, peak].exp(), 0.01 * float(d[:, peak].exp().max()))
        off = s[slots.OFF] / d.exp().scatter(1, y.unsqueeze(1), 0.0).sum(1)
        assert_within(off, torch.ones_like(off), 1e-4)


def test_a_target_far_above_all_others_sets_the_shift() -> None:
    z, y = products(1.0)
    z.scatter_(1, y.unsqueeze(1), 200.0)
    for edges in ([0, V], [0, 600, V]):
        state, out, _ = sweep(z, y, Head(), edges, torch.bfloat16)
        assert bool(((state[slots.TARGET] - state[slots.SHIFT]).abs() <= triton_exp.LIMIT).all())
        assert out.isfinite().all()


def test_the_second_sweep_moves_no_shift() -> None:
    """A backward starts from the forward's last shift, and its factors are of that one."""
    z, y = products(8.0)
    last = sweep(z, y, Head(), [0, 300, V], None)[0][slots.SHIFT].clone()
    state = fresh(ROWS)
    state[slots.SHIFT] = last
    sweep(z, y, Head(), [0, 17, 600, V], None, state=state)
    assert torch.equal(state[slots.SHIFT], last)
    assert torch.equal(state[slots.RESCALE], torch.ones(ROWS))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_shift_moves_only_when_it_must(dtype: torch.dtype | None) -> None:
    """Sums kept elsewhere are rescaled as rarely."""
    z, y = products(1.0)
    z[:, 700] = 12.0
    state, _, _ = sweep(z, y, Head(), [0, 600, V], dtype)
    assert torch.equal(state[slots.RESCALE], torch.ones(ROWS))


def test_a_tile_of_forbidden_tokens_leaves_no_trace() -> None:
    z, y = products()
    forbidden = torch.arange(V) < 400
    y = y.clamp(min=400)
    state, out, spread = sweep(z, y, Head(forbidden=forbidden), [0, 200, 400, V], None)
    assert torch.equal(out[:, :400], torch.zeros(ROWS, 400).double())
    assert torch.equal(spread[:, :400], torch.zeros(ROWS, 400).double())
    check(z, y, Head(forbidden=forbidden), state, 1e-5)


def test_only_statistics_writes_nothing() -> None:
    z, y = products()
    before, state = z.clone(), fresh(ROWS)
    triton_exp.exp_tile(z, z, None, y, 0, state, Head(), TileOutputs())
    assert torch.equal(z, before)
    assert torch.equal(state[:-1], sweep(z, y, Head(), [0, V], torch.float32)[0][:-1])


def test_rows_apart_in_memory() -> None:
    z, y = products()
    wide, out = torch.randn(ROWS, 2 * V), torch.full((ROWS, V + 9), NAN)
    wide[:, 5 : V + 5] = z
    state = fresh(2 * ROWS)[:, :ROWS]
    triton_exp.exp_tile(wide[:, 5 : V + 5], out[:, :V], None, y, 0, state, Head(), TileOutputs(exponentials=True))
    like, expected, _ = sweep(z, y, Head(), [0, V], torch.float32)
    assert torch.equal(state[:-1], like[:-1])
    assert torch.equal(out[:, :V].double(), expected)
    assert out[:, V:].isnan().all()


def test_no_rows() -> None:
    z = torch.empty(0, V)
    triton_exp.exp_tile(z, z, None, torch.empty(0).long(), 0, fresh(0), Head(), TileOutputs())
