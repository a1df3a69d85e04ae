"""gae on both backends against the fp64 loop over positions, and a whole step of PPO under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard_kernels import gae, launch
from tests.closeness import assert_like_eager
from tests.kernels import oracle

pytest.importorskip("triton")
from onecard_kernels.advantages import triton as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
BOTH = ("torch", "triton")
COEFS = [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.7), (1.0, 0.3)]


def masks(b: int, t: int) -> dict[str, torch.Tensor]:
    at, half = torch.arange(t).expand(b, t), torch.randint(0, t + 1, (b, 1))
    rows = torch.ones(b, t)
    rows[::2] = 0
    return {
        "all": torch.ones(b, t),
        "none": torch.zeros(b, t, dtype=torch.bool),
        "holes": torch.rand(b, t) < 0.5,
        "few": torch.rand(b, t) < 0.1,
        "leading": (at >= half).long(),
        "trailing": (at < half).to(torch.uint8),
        "rows": rows,
    }


def check(
    backend: str, rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, last: torch.Tensor | None, **kw: Any
) -> None:
    """At most twice as wrong as the loop in the inputs' dtype; NaN wherever the mask is 0."""
    rewards, values = (x.masked_fill(mask == 0, NAN) for x in (rewards, values))
    wide = [None if x is None else x.double() for x in (rewards, values, last)]
    truth = oracle.gae(*wide[:2], mask, last_values=wide[2], **kw)
    eager = oracle.gae(rewards, values, mask, last_values=last, **kw)
    got = gae(rewards, values, mask, last_values=last, backend=backend, **kw)
    for name in ("advantages", "returns"):
        x = getattr(got, name)
        assert x.dtype == getattr(eager, name).dtype
        assert_like_eager(x, getattr(eager, name), getattr(truth, name), name)
        assert torch.equal(x[mask == 0], torch.zeros_like(x[mask == 0]))


@pytest.mark.parametrize("mask", ["all", "none", "holes", "few", "leading", "trailing", "rows"])
@pytest.mark.parametrize("backend", BOTH)
def test_every_mask(backend: str, mask: str) -> None:
    for gamma, lam in COEFS:
        for last in (None, torch.randn(4).to(DEVICE)):
            rewards, values = torch.randn(2, 4, 11).to(DEVICE)
            check(backend, rewards, values, masks(4, 11)[mask].to(DEVICE), last, gamma=gamma, lam=lam)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BOTH)
def test_every_dtype(backend: str, dtype: torch.dtype) -> None:
    rewards, values = torch.randn(2, 3, 13).to(DEVICE, dtype)
    mask = masks(3, 13)["holes"].to(DEVICE)
    check(backend, rewards, values, mask, torch.randn(3).to(DEVICE, dtype), gamma=0.97, lam=0.9)
    check(backend, rewards, values.float(), mask, torch.randn(3).to(DEVICE, torch.float64), gamma=0.97, lam=0.9)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 17, 23, 24, 25, 40])
def test_rows_of_several_blocks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 8: the carry goes from one to the next over masked positions, also over whole masked blocks."""
    monkeypatch.setattr(kernel, "LARGEST_BLOCK", 8)
    for mask in ("holes", "few", "all", "trailing"):
        rewards, values = torch.randn(2, 3, length).to(DEVICE)
        valid, last = masks(3, length)[mask].to(DEVICE), torch.randn(3).to(DEVICE)
        check("triton", rewards, values, valid, last, gamma=1.0, lam=0.9)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("backend", BOTH)
def test_nothing(backend: str, shape: tuple[int, int]) -> None:
    x = torch.ones(shape, device=DEVICE)
    got = gae(x, x, x, last_values=torch.ones(shape[0], device=DEVICE), backend=backend)
    assert got.advantages.shape == got.returns.shape == shape


def test_a_row_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 2 begins more than 2^31 elements behind row 0; the memory between them is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    mask = torch.empty(2**31 + 64, dtype=torch.uint8, device=DEVICE).as_strided((3, 6), (2**30 + 16, 1)).fill_(1)
    rewards, values = torch.randn(2, 3, 6).to(DEVICE)
    far, near = (gae(rewards, values, m, backend="triton") for m in (mask, torch.ones(3, 6, device=DEVICE)))
    assert torch.equal(far.advantages, near.advantages)


@pytest.mark.parametrize("backend", BOTH)
def test_a_masked_row_hides_its_last_value(backend: str) -> None:
    mask = torch.tensor([[0, 0, 0], [1, 0, 1]], device=DEVICE)
    x = torch.ones(2, 3, device=DEVICE)
    got = gae(x, x, mask, last_values=torch.tensor([NAN, 1.0], device=DEVICE), backend=backend)
    assert torch.equal(got.advantages[0], torch.zeros(3, device=DEVICE))
    assert torch.equal(got.returns[0], torch.zeros(3, device=DEVICE))


def test_one_launch() -> None:
    big = torch.empty(64, 4096, device="meta")
    with launch.recording() as recorded:
        advantages, returns = kernel.launch_gae(big, big, big.bool(), None, 0.99, 0.95)
    assert advantages.shape == returns.shape == (64, 4096)
    assert [(r.grid, r.constexprs["BLOCK"]) for r in recorded] == [((64,), 2048)]
