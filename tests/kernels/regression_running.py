"""The cases of regression_material.py, and functions that run them and compare them with their equation in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard_kernels.logprob import tuning
from tests.closeness import assert_within, error, floor
from tests.kernels.regression_material import EPS, FUNCTIONS, Case, H, Tensors

BACKENDS = ("torch", "triton")
TILED = [Case(name, "triton", tuning.TILED) for name in ("linear_logprobs", "linear_logprobs" + H)]


def cases(*beginnings: str, tiled: bool = False) -> list[Case]:
    """Every case of the functions whose names begin so; of the linear ones on Triton, which are slow, every other."""
    found = []
    for name in (n for n in FUNCTIONS if n.startswith(beginnings)):
        if name.startswith(("linear_logprobs", "linear_ppo_loss")):
            found += [Case(name, "torch", tuning.CHUNKED), Case(name, "torch", tuning.LOW_MEMORY)]
            found += [Case(name, "triton", tuning.LOW_MEMORY if name.endswith(H) else tuning.CHUNKED)]
        else:
            found += [Case(name, backend) for backend in (BACKENDS if name != "dpo_loss" else ("torch",))]
    return found + [case for case in TILED if tiled and case.name.startswith(beginnings)]


LINEAR = cases("linear_logprobs", "linear_ppo_loss")
FROM_LOGITS = cases("selective", "logits_ppo")
WITH_VOCABULARY = [*cases("linear_", tiled=True), *FROM_LOGITS]
WITH_TARGETS = [*LINEAR, *TILED, *FROM_LOGITS]
EVERY = [*WITH_VOCABULARY, *cases("ppo_loss", "value_loss", "gae", "dpo_loss")]


def over(chosen: list[Case]) -> Any:
    return pytest.mark.parametrize("case", chosen, ids=str)


def double(data: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in data.items()}


def poison_masked(data: Tensors) -> Tensors:
    """A copy of the data in which masked tokens are NaN, or -100 in integer tensors such as targets."""
    if "mask" not in data:
        return data
    out, off = dict(data), ~data["mask"].bool()
    for name, x in data.items():
        if name != "mask" and isinstance(x, Tensor) and x.shape[: off.dim()] == off.shape:
            junk = float("nan") if x.is_floating_point() else -100
            out[name] = x.masked_fill(off.view(*off.shape, *(1,) * (x.dim() - off.dim())), junk)
    return out


def evaluate(
    fn: Callable[..., Tensor], data: dict[str, Any], leaves: tuple[str, ...], upstream: Tensor | None = None
) -> tuple[Tensor, Tensors]:
    """The value, and the gradients of its sum (or of its product with `upstream`)."""
    held = {n: x.detach().clone().requires_grad_() if n in leaves else x for n, x in data.items()}
    value = fn(**held)
    if not leaves:
        return value.detach(), {}
    weighted = value if upstream is None else value * upstream.to(value)
    # only what is finite has a gradient: an impossible token is a constant
    grads = torch.autograd.grad(weighted[weighted.isfinite()].sum(), [held[n] for n in leaves])
    return value.detach(), dict(zip(leaves, grads, strict=True))


def compare(
    case: Case,
    data: Tensors,
    upstream: Tensor | None = None,
    *,
    tolerance: float | None = None,
    leaves: tuple[str, ...] | None = None,
    slack: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensors]:
    """Value and gradients against the equation in fp64; the gradients at most twice as wrong as it is in fp32."""
    leaves = case.leaves if leaves is None else leaves
    upstream = upstream if case.function.per_token else None
    equation, given = case.function.equation, {**data, **options}
    truth, true_grads = evaluate(equation, double(given), leaves, upstream)
    _, eager_grads = evaluate(equation, given, leaves, upstream)
    value, grads = evaluate(case.call, {**poison_masked(data), **options}, leaves, upstream)
    assert value.dtype == torch.float32
    assert_within(value, truth, case.tolerance if tolerance is None else tolerance)
    assert_gradients(grads, eager_grads, true_grads, data, slack)
    return value, grads


def assert_gradients(
    grads: Tensors, eager_grads: Tensors, true_grads: Tensors, data: Tensors, slack: float = 0.0
) -> None:
    # A log-probability rounded in its last place moves the ratio, and with it the gradient, by as much.
    rounding = EPS * float(data["old_logprobs"].abs().max()) if "old_logprobs" in data else 0.0
    for name, true in true_grads.items():
        assert grads[name].dtype == data[name].dtype
        allowed = 2 * error(eager_grads[name], true) + floor(true, grads[name].dtype) + slack
        largest = float(true.abs().max()) if true.numel() else 0.0
        assert_within(grads[name], true, allowed + rounding * largest, f"gradient by {name}")
        if "mask" in data and name not in ("weight", "bias"):
            off = ~data["mask"].bool()
            assert torch.equal(grads[name][off], torch.zeros_like(grads[name][off])), "masked tokens have a gradient"
