"""The stated tolerances: log-probabilities against fp64, gradients against eager of the same dtype, any chunk size.

Vocabularies are realistic where torch runs; in Triton's interpreter a row of 515 logits, one above a power of two by 3,
has whole tiles and a rest as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import LOGPROB_TOLERANCES, assert_like_eager, assert_within, error
from tests.kernels.regression_material import EPS, Case, H
from tests.kernels.regression_running import double, evaluate, over

pytest.importorskip("triton", reason="triton is not installed")

LINEAR = [Case("linear_logprobs", b, i) for b in ("torch", "triton") for i in ("chunked", "low_memory")]
TILED = Case("linear_logprobs", "triton", "tiled")
SELECTIVE = [Case("selective_log_softmax", b) for b in ("torch", "triton")]
WITH_ENTROPY = [Case(case.name + H, case.backend, case.implementation) for case in [*LINEAR, *SELECTIVE]]
SIZES = {"torch": (8, 64, 32000), "triton": (4, 16, 515)}
TILES = {"torch": {"rows": 5, "columns": 12000}, "triton": {"rows": 3, "columns": 300}}
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(case: Case, dtype: torch.dtype, std: float = 4.0) -> dict[str, Any]:
    n, d, v = SIZES[case.backend]
    data: dict[str, Any] = {"targets": torch.randint(v, (n,))}
    if case.name.startswith("selective"):
        return {**data, "logits": (torch.randn(n, v) * std).to(dtype)}
    return {**data, "hidden": torch.randn(n, d).to(dtype), "weight": (torch.randn(v, d) * std / d**0.5).to(dtype)}


def peak(case: Case, dtype: torch.dtype, away: float) -> dict[str, Any]:
    """Targets whose logit is `away` above all others, which are 0 or nearly. Rows of the head are orthogonal."""
    n, v = 3, 48
    targets = torch.tensor([0, v - 1, 20])
    if case.name.startswith("selective"):
        logits = torch.randn(n, v) * 0.2
        return {"targets": targets, "logits": logits.scatter(1, targets.unsqueeze(1), away).to(dtype)}
    weight = (torch.linalg.qr(torch.randn(v, v)).Q * 4).to(dtype)
    hidden = (weight[targets].float() * (away / 16)).to(dtype)
    return {"targets": targets, "hidden": hidden, "weight": weight}


def compare_gradients(case: Case, data: dict[str, Any], leaves: tuple[str, ...]) -> tuple[dict[str, Tensor], ...]:
    upstream = torch.randn(data["targets"].shape)
    truth = evaluate(case.function.equation, double(data), leaves, upstream)[1]
    eager = evaluate(case.function.equation, data, leaves, upstream)[1]
    with case.tiles(**TILES[case.backend]):
        grads = evaluate(case.call, data, leaves, upstream)[1]
    for name, true in truth.items():
        assert grads[name].dtype == data[name].dtype
        assert_like_eager(grads[name], eager[name], true, name)
    return grads, truth


@pytest.mark.parametrize(("dtype", "std"), LOGPROB_TOLERANCES, ids=str)
@over([*LINEAR, TILED, *SELECTIVE])
def test_logprobs_are_within_their_tolerances(case: Case, dtype: torch.dtype, std: int) -> None:
    data = make(case, dtype, std)
    truth, _ = evaluate(case.function.equation, double(data), ())
    with case.tiles(**TILES[case.backend]), torch.no_grad():
        assert_within(case.call(**data), truth, LOGPROB_TOLERANCES[dtype, std])
    if case.leaves:  # the pass that also forms directions
        with case.tiles(**TILES[case.backend]):
            assert_within(evaluate(case.call, data, case.leaves)[0], truth, LOGPROB_TOLERANCES[dtype, std])


@BOTH
@over([*LINEAR, *SELECTIVE, *WITH_ENTROPY])
def test_gradients_are_at_most_twice_as_wrong_as_eager(case: Case, dtype: torch.dtype) -> None:
    compare_gradients(case, make(case, dtype), case.leaves)


@BOTH
@over([case for case in LINEAR if case.backend == "torch"])
def test_gradients_of_a_trained_head_too(case: Case, dtype: torch.dtype) -> None:
    compare_gradients(case, make(case, dtype), ("hidden", "weight"))


@BOTH
@pytest.mark.parametrize("away", [11.0, 16.0])  # 1 - p of 8e-4 and 5e-6
@over([*LINEAR, TILED, *SELECTIVE, *WITH_ENTROPY])
def test_confident_tokens_keep_the_true_class_gradient(case: Case, away: float, dtype: torch.dtype) -> None:
    """p_y - 1 relative to itself: to fp32 rounding of the logits, and one rounding of what is stored."""
    data = peak(case, dtype, away)
    truth, _ = evaluate(case.function.equation, double(data), ())
    assert float(truth.abs().max()) < 1e-2
    with case.tiles(**TILES[case.backend]):
        value, _ = evaluate(case.call, data, case.leaves)
    # logits near 16 are rounded by 16 EPS, several times in a product; a relative error of e^z
    assert_within(value / truth, torch.ones_like(truth), 64 * EPS, "log p_y")
    if not case.leaves:
        return
    grads, true_grads = compare_gradients(case, data, case.leaves)
    for name, grad in grads.items():
        both = [
            g.double() @ data["weight"].double().T if name == "hidden" else g.double() for g in (grad, true_grads[name])
        ]
        mine, true = (x.gather(1, data["targets"].unsqueeze(1)) for x in both)
        stored = 0.0 if dtype == torch.float32 else 2.0**-7
        assert_within(mine / true, torch.ones_like(true), 128 * EPS + stored, "p_y - 1")


def under_autocast(equation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The plain equation as a model of fp32 weights runs it under autocast: bf16 products, fp32 from there on."""

    def eager(**data: Any) -> Tensor:
        return equation(**{n: x.bfloat16() if n in ("hidden", "weight") else x for n, x in data.items()})

    return eager


@over([*LINEAR, TILED])
def test_autocast_is_within_its_tolerance(case: Case) -> None:
    """1e-4 of the rounded operands' truth, as bf16 inputs; of the unrounded ones' no further than eager, and 5e-2."""
    data = make(case, torch.float32)
    leaves = ("hidden", "weight") if case.backend == "torch" and case.leaves else case.leaves
    rounded = {n: x.bfloat16() if n in ("hidden", "weight") else x for n, x in data.items()}
    of_rounded, _ = evaluate(case.function.equation, double(rounded), ())
    truth, true_grads = evaluate(case.function.equation, double(data), leaves)
    eager, eager_grads = evaluate(under_autocast(case.function.equation), data, leaves)
    with case.tiles(**TILES[case.backend]), torch.autocast("cpu", torch.bfloat16):
        held = {n: x.clone().requires_grad_() if n in leaves else x for n, x in data.items()}
        value = case.call(**held)
    grads = torch.autograd.grad(value.sum(), [held[n] for n in leaves]) if leaves else ()  # outside, as a trainer does
    assert_within(value, of_rounded, LOGPROB_TOLERANCES[torch.bfloat16, 4])
    assert_within(value, truth, min(5e-2, 1.1 * error(eager, truth)))
    for name, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == torch.float32
        assert_like_eager(grad, eager_grads[name], true_grads[name], name)


def rounding(case: Case, data: dict[str, Any], value: Tensor, other: Tensor, name: str) -> None:
    scale = max(1.0, float(value.abs().max()))
    assert_within(other, value, 16 * EPS * scale, name)


@over([*LINEAR, TILED, *WITH_ENTROPY])
def test_the_chunk_size_changes_rounding_alone(case: Case) -> None:
    if case.name.startswith("selective"):
        pytest.skip("its rows are whole: see test_the_block_of_rows_does_not_matter")
    data, results = make(case, torch.float32), []
    for rows, columns in ((1, 4000), (3, 9000), (1000, 1 << 20)) if case.backend == "torch" else ((2, 200), (9, 1024)):
        with case.tiles(rows, columns):
            results.append(evaluate(case.call, data, case.leaves))
    for value, grads in results[1:]:
        rounding(case, data, results[0][0], value, "value")
        for name, grad in grads.items():
            # sums of V terms in another order: no further from one another than each may be from the truth
            assert_within(grad, results[0][1][name], 256 * EPS * float(grad.abs().max()), name)


@BOTH
@over([*LINEAR, TILED, *SELECTIVE, *WITH_ENTROPY])
def test_splitting_the_batch_changes_rounding_alone(case: Case, dtype: torch.dtype) -> None:
    data = make(case, dtype)
    n = data["targets"].shape[0]
    with case.tiles(**TILES[case.backend]):
        value, grads = evaluate(case.call, data, case.leaves)
        parts = []
        for part in (slice(0, 1), slice(1, n)):
            some = {name: x if name == "weight" else x[part] for name, x in data.items()}
            parts.append(evaluate(case.call, some, case.leaves))
    rounding(case, data, value, torch.cat([part[0] for part in parts]), "value")
    for name, grad in grads.items():
        again = torch.cat([part[1][name] for part in parts])
        eps = 256 * EPS if dtype == torch.float32 else 2.0**-7  # a rounding of bf16 may fall the other way
        assert_within(again, grad, eps * float(grad.float().abs().max()), name)
