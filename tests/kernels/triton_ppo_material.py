"""Inputs of ppo_loss and value_loss for their Triton kernels, and the comparison with the reference."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from onecard_kernels import ppo_loss, value_loss
from tests.closeness import FLOOR_ULPS, assert_like_eager, assert_within, error, floor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"off": ("entropy", "ref_logprobs", "weights")},
    "weights": {"off": ("entropy", "ref_logprobs"), "clip_low": 0.1, "clip_high": 0.3},
    "dual": {"off": ("entropy", "ref_logprobs", "weights"), "dual_clip": 1.3},
    "measured": {"kl_estimator": "k2"},
    "k1": {"off": ("weights",), "kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"off": ("entropy",), "kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"off": ("entropy", "weights"), "kl_coef": 0.3},
    "all": {"entropy_coef": 0.2, "kl_coef": 0.3, "dual_clip": 1.5, "clip_low": 0.15, "normalizer": 7.3},
}


def one(x: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([x], dtype=dtype, device=DEVICE)


def tokens(shape: tuple[int, ...], dtype: torch.dtype, off: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Ratios on both sides of the range, advantages of both signs."""
    batch = {"logprobs": -torch.rand(shape) * 3}
    batch |= {name: batch["logprobs"] + 0.3 * torch.randn(shape) for name in ("old_logprobs", "ref_logprobs")}
    batch |= {"advantages": torch.randn(shape), "entropy": torch.rand(shape) * 5, "weights": torch.rand(shape) * 2}
    return {name: x.to(DEVICE, dtype) for name, x in batch.items() if name not in off}


def values(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool = True) -> dict[str, torch.Tensor]:
    old = torch.randn(shape)
    batch = {"values": old + 0.4 * torch.randn(shape), "old_values": old, "returns": torch.randn(shape)}
    batch |= {"weights": torch.rand(shape)} if weighted else {}
    return {name: x.to(DEVICE, dtype) for name, x in batch.items()}


def masks(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    t = torch.arange(shape[-1]).expand(shape)
    holes = torch.rand(shape) < 0.6
    rows = torch.zeros(shape, dtype=torch.bool)
    rows[::2] = True
    return {
        name: mask.to(DEVICE)
        for name, mask in {
            "all": torch.ones(shape),
            "none": torch.zeros(shape, dtype=torch.bool),
            "holes": holes,
            "leading": (t >= 3).long(),
            "trailing": (t < 2).float(),
            "rows": rows.to(torch.uint8),
        }.items()
    }


def run(function: Any, leaves: tuple[str, ...], batch: dict[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """Loss, metrics and gradients of the leaves, by name."""
    batch = {name: x.detach().requires_grad_(name in leaves) for name, x in batch.items()}
    got = function(**batch, **options)
    grads = torch.autograd.grad(got.loss, [batch[name] for name in leaves], allow_unused=True)
    return {"loss": got.loss, **got.metrics} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


run_policy = functools.partial(run, ppo_loss, ("logprobs", "entropy"))
run_value = functools.partial(run, value_loss, ("values",))


def magnitudes(function: Any, batch: dict[str, torch.Tensor], mask: torch.Tensor, **options: Any) -> dict[str, float]:
    """Sums of absolute values of what single tokens add to loss and metrics: the scale of a sum's rounding."""
    sums: dict[str, float] = {}
    for i in mask.flatten().nonzero().flatten().tolist():
        token = {name: x.flatten()[i : i + 1] for name, x in batch.items()}
        got = function(**token, mask=torch.ones_like(token[next(iter(token))]), backend="torch", **options)
        for name, x in {"loss": got.loss, **got.metrics}.items():
            sums[name] = sums.get(name, 0.0) + abs(x.item())
    return sums


def compare(
    function: Any, leaves: tuple[str, ...], batch: dict[str, torch.Tensor], mask: torch.Tensor, **options: Any
) -> None:
    """Against the fp64 reference on the same numbers, at most twice as wrong as the reference in the inputs' dtype."""
    wide = {name: x.double() for name, x in batch.items()}
    truth = run(function, leaves, wide, mask=mask, backend="torch", **options)
    eager = run(function, leaves, batch, mask=mask, backend="torch", **options)
    got = run(function, leaves, batch, mask=mask, backend="triton", **options)
    assert list(got) == list(eager)
    divisor = options.pop("normalizer", None) or max(1.0, float(mask.sum()))
    scales = magnitudes(function, wide, mask, normalizer=divisor, **options)
    for name, expected in truth.items():
        if expected is None:
            assert got[name] is None, name
            continue
        assert got[name].dtype == eager[name].dtype, name
        assert got[name].shape == eager[name].shape, name
        if name in scales and math.isfinite(scales[name]):
            rounding = FLOOR_ULPS * torch.finfo(got[name].dtype).eps * scales[name]
            tolerance = 2.0 * error(eager[name], expected) + rounding
            assert_within(got[name], expected, max(tolerance, floor(expected, got[name].dtype)), name)
        else:
            assert_like_eager(got[name], eager[name], expected, name)
