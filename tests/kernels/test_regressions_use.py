"""Named regression tests of how functions are used: layouts, masks, repeated backwards, autocast, the compiler.

The table of all of them is at the top of test_regressions.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo

from onecard_kernels import linear_ppo_loss, logits_ppo_loss, ppo_loss, selective_log_softmax
from tests.closeness import assert_within
from tests.kernels.regression_material import EPS, MASK, SHAPE, Case, H, V
from tests.kernels.regression_running import (
    EVERY,
    FROM_LOGITS,
    assert_gradients,
    cases,
    compare,
    double,
    evaluate,
    over,
    poison_masked,
)

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "columns apart", "reversed dimensions"])
@over([case for case in EVERY if case.name != "dpo_loss"])
def test_inputs_of_any_strides(case: Case, layout: str) -> None:
    """The same numbers in other memory: the same result, the gradient in the same places and nowhere else."""
    store, view = {
        "transposed": (lambda x: x.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)),
        "sliced": (lambda x: torch.cat([x, x], 1), lambda x: x[:, : x.shape[1] // 2]),
        "columns apart": (lambda x: torch.stack([x, x], -1), lambda x: x[..., 0]),
        "reversed dimensions": (lambda x: x.movedim(-1, 0).contiguous(), lambda x: x.movedim(0, -1)),
    }[layout]
    data = poison_masked(case.make())
    upstream = torch.randn(SHAPE) if case.function.per_token else None
    with case.tiles():
        value, grads = evaluate(case.call, data, case.leaves, upstream)
        stored = {name: store(x) for name, x in data.items()}

        def through(**held: torch.Tensor) -> torch.Tensor:
            return case.call(**{name: view(x) for name, x in held.items()})

        got, got_grads = evaluate(through, stored, case.leaves, upstream)
    assert_within(got, value, 16 * EPS * max(1.0, float(value.abs().max())))
    for name, grad in grads.items():
        largest = float(grad.abs().max())
        assert_within(view(got_grads[name]), grad, 32 * EPS * largest, name)
        assert_within(got_grads[name].abs().sum(), grad.abs().sum(), 1e-3 * float(grad.abs().sum()), "elsewhere")


@pytest.mark.parametrize("shape", [SHAPE, (0, 4)], ids=str)
@over([case for case in EVERY if case.name != "dpo_loss"])
def test_no_valid_token(case: Case, shape: tuple[int, int]) -> None:
    """Zero, with a gradient of zeros: not 0 / 0, and not the NaN that masked tokens hold."""
    data = poison_masked(case.make(shape, mask=torch.zeros(shape)))
    with case.tiles():
        value, grads = evaluate(case.call, data, case.leaves)
    assert torch.equal(value, torch.zeros_like(value))
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(data[name]))


@over([case for case in EVERY if case.name != "dpo_loss"])
def test_a_fully_masked_row(case: Case) -> None:
    """As if the row were not there."""
    mask = MASK.clone()
    mask[1] = False
    data = case.make(mask=mask)
    with case.tiles():
        value, grads = compare(case, data)
        without = {n: x[[0]] if n != "weight" else x for n, x in data.items()}
        expected, expected_grads = evaluate(case.call, without, case.leaves)
    kept = value if value.dim() == 0 else value[:, [0]] if case.name == "gae" else value[[0]]
    assert_within(kept, expected, 8 * EPS * float(expected.abs().max()))
    for name, grad in grads.items():
        assert_within(grad[[0]], expected_grads[name], 16 * EPS * float(grad.abs().max()))


@over([case for case in EVERY if case.leaves])
def test_a_second_backward_is_equal(case: Case) -> None:
    data = case.make()
    with case.tiles():
        held = {n: x.clone().requires_grad_() if n in case.leaves else x for n, x in data.items()}
        total = case.call(**held).sum()
        first = torch.autograd.grad(total, [held[n] for n in case.leaves], retain_graph=True)
        second = torch.autograd.grad(total, [held[n] for n in case.leaves])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(bool(a.any()) for a in first)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_backward_in_place_raises(backend: str) -> None:
    """The first one wrote over the logits: a second would take a gradient for logits."""
    logits, targets = torch.randn(3, V), torch.tensor([0, 5, V - 1])
    expected, expected_grad = evaluate(
        lambda logits: selective_log_softmax(logits, targets, backend=backend).logprobs, {"logits": logits}, ("logits",)
    )
    leaf = logits.clone().requires_grad_()
    out = selective_log_softmax(leaf * 1, targets, inplace_backward=True, backend=backend).logprobs
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0], expected_grad["logits"])
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(out.sum(), leaf)


@over([case for case in EVERY if case.leaves])
def test_an_output_used_twice(case: Case) -> None:
    """Both uses arrive added up, in one gradient that differs between tokens."""
    data = case.make()

    def squared(fn: Any) -> Any:
        def both(**held: torch.Tensor) -> torch.Tensor:
            out = fn(**held)
            return out * out + 3.0 * out

        return both

    truth = evaluate(squared(case.function.equation), double(data), case.leaves)[1]
    eager = evaluate(squared(case.function.equation), data, case.leaves)[1]
    with case.tiles():
        grads = evaluate(squared(case.call), poison_masked(data), case.leaves)[1]
    # the factor 2 out + 3 is as wrong as the value is, which its own tolerance allows
    loose = {n: 1 + 4 * case.tolerance * x.abs().max() for n, x in truth.items()}
    for name, true in truth.items():
        tolerance = 2 * float((eager[name] - true).abs().max()) + float(loose[name] - 1)
        assert_within(grads[name], true, tolerance, name)


@over(EVERY)
def test_two_runs_are_equal(case: Case) -> None:
    data = case.make()
    with case.tiles():
        first, second = (evaluate(case.call, poison_masked(data), case.leaves) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in case.leaves)


def test_operators_have_names_of_their_own() -> None:
    """Two operators of one name: the one registered last silently takes the calls of both."""
    source = Path(__file__).resolve().parents[2] / "kernels" / "onecard_kernels"
    names = [
        name
        for file in source.rglob("*.py")
        for name in re.findall(r"custom_op\(\s*\"(onecard::\w+)\"", file.read_text())
    ]
    assert len(names) > 5
    assert sorted(names) == sorted(set(names))


@over(FROM_LOGITS)
def test_the_block_of_rows_does_not_matter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the last bit: no row's arithmetic depends on which rows are beside it."""
    data, results = case.make(), []
    for rows in (1, 5, 1000):
        monkeypatch.setattr("onecard_kernels.logprob.rows.BLOCK_BYTES", rows * V * 4)
        monkeypatch.setattr("onecard_kernels.logprob.torch_rows.BLOCK_BYTES", rows * V * 4)
        results.append(evaluate(case.call, data, case.leaves))
    for value, grads in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grads["logits"], results[0][1]["logits"])


@over(EVERY)
def test_autocast_rounds_operands_alone(case: Case) -> None:
    """To the bit what hidden states and head in bf16 give; no bit of anything else changes."""
    data = poison_masked(case.make())
    rounded = {n: x.bfloat16() if n in ("hidden", "ref_hidden", "weight") else x for n, x in data.items()}
    with case.tiles():
        expected, grads = evaluate(case.call, rounded, case.leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, again = evaluate(case.call, data, case.leaves)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert all(torch.equal(again[name], grad.to(data[name].dtype)) for name, grad in grads.items())


@pytest.mark.parametrize("low", ["logits or hidden", "weight", "per token", "everything"])
@over([case for case in EVERY if case.name != "dpo_loss"])
def test_mixed_dtypes(case: Case, low: str) -> None:
    """fp32 out of any mixture, each gradient in the dtype of what it is the gradient of."""
    groups = {
        "logits or hidden": ("logits", "hidden", "ref_hidden", "logprobs", "values"),
        "weight": ("weight",),
        "per token": ("old_logprobs", "advantages", "weights", "returns", "old_values", "rewards"),
    }
    chosen = groups.get(low) or sum(groups.values(), ())
    data = case.make()
    if not any(name in data for name in chosen):
        pytest.skip("takes no such tensor")
    data = {n: x.bfloat16() if n in chosen else x for n, x in data.items()}
    upstream = torch.randn(SHAPE) if case.function.per_token else None
    as_fp32 = {n: x.float() if x.is_floating_point() else x for n, x in data.items()}
    truth, true_grads = evaluate(case.function.equation, double(data), case.leaves, upstream)
    eager_grads = evaluate(case.function.equation, as_fp32, case.leaves, upstream)[1]
    eager_grads = {name: grad.to(data[name].dtype) for name, grad in eager_grads.items()}
    with case.tiles():
        value, grads = evaluate(case.call, poison_masked(data), case.leaves, upstream)
    assert value.dtype == torch.float32
    assert_within(value, truth, case.tolerance)
    assert_gradients(grads, eager_grads, true_grads, data)


@over([case for case in cases("linear_ppo", "logits_ppo", "ppo_loss") if not case.name.endswith(H)])
def test_python_floats_under_compile(case: Case) -> None:
    """fp32 comes out, with eager's numbers. A tensor that changes costs no graph, a number one a value."""
    losses: dict[str, Callable[..., Any]]
    losses = {"linear": linear_ppo_loss, "logits": logits_ppo_loss, "ppo_lo": ppo_loss}
    function = losses[case.name[:6]]
    data = case.make()
    (leaf,) = case.leaves
    rest = {**{n: x for n, x in data.items() if n != leaf}, "ref_logprobs": data["old_logprobs"]}
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    def step(held: torch.Tensor, kl_coef: float, clip: float, normalizer: torch.Tensor) -> torch.Tensor:
        options = {"kl_coef": kl_coef, "clip_low": clip, "clip_high": clip, "normalizer": normalizer}
        return function(**{leaf: held}, **rest, **options, backend=case.backend).loss

    dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count)
    # one kl_coef, then another, then the first again; the normaliser is never the same
    for i, kl_coef in enumerate((0.1, 0.1, 0.113, 0.1, 0.113)):
        held, normalizer = data[leaf].clone().requires_grad_(), torch.tensor(3.0 + i)
        with case.tiles():
            loss = compiled(held, kl_coef, 0.2, normalizer)
            grad = torch.autograd.grad(loss, held)[0]
            assert loss.dtype == grad.dtype == torch.float32
            if i == 4:
                assert torch.equal(loss, step(held, kl_coef, 0.2, normalizer))
    assert len(graphs) <= 2
