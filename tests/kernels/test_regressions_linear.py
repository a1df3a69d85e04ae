"""Named regression tests of what linear functions alone have: heads that learn, and tiles.

The table of all of them is at the top of test_regressions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.closeness import assert_within
from tests.kernels.regression_material import EPS, SHAPE, Case, D, V
from tests.kernels.regression_running import (
    LINEAR,
    TILED,
    assert_gradients,
    cases,
    compare,
    dirty,
    double,
    evaluate,
    over,
)

pytest.importorskip("triton", reason="triton is not installed")

# --- heads that learn


@over(LINEAR)
def test_a_trained_head(case: Case) -> None:
    """hidden, weight and bias each get their gradient, alone and together."""
    upstream = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.5, -1.0]])
    data = {**case.make(), "bias": torch.randn(V)}
    for leaves in (("hidden", "weight", "bias"), ("weight",), ("bias",)):
        with case.tiles():
            compare(case, data, upstream, leaves=leaves, bar=2 * case.bar, temperature=0.7, logit_scale=0.8)


@over(cases("linear_kl"))
def test_a_head_that_cannot_be_trained_says_so(case: Case) -> None:
    data = case.make()
    with pytest.raises(ValueError, match="weight requires a gradient"):
        case.call(**{**data, "weight": data["weight"].requires_grad_()})


@over(LINEAR)
def test_a_head_wrapped_in_lora(case: Case) -> None:
    """W + BA from peft: the frozen W gets nothing, B and A what eager gives them."""
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(D, V, bias=False)

    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"]), Model())
    head = model.lm_head
    torch.nn.init.normal_(head.lora_B["default"].weight)
    data = case.make()
    head.base_layer.weight.data.copy_(data["weight"])
    learned = {n: p for n, p in head.named_parameters() if p.requires_grad}
    assert len(learned) == 2

    def gradients(fn: Callable[..., torch.Tensor], given: dict[str, Any]) -> dict[str, torch.Tensor]:
        weight = head.base_layer.weight + head.get_delta_weight("default")
        value = fn(**{**given, "weight": weight.to(given["hidden"].dtype)})
        return dict(zip(learned, torch.autograd.grad(value.sum(), list(learned.values())), strict=True))

    with case.tiles():
        got = gradients(case.call, dirty(data))
    eager = gradients(case.function.equation, data)
    head.double()
    learned = {n: p for n, p in head.named_parameters() if p.requires_grad}
    assert_gradients(got, eager, gradients(case.function.equation, double(data)), {**learned_as(got), **policy(data)})


def learned_as(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What their dtype is compared with."""
    return {name: torch.empty_like(grad) for name, grad in grads.items()}


def policy(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: data[name] for name in ("old_logprobs",) if name in data}


@over(LINEAR)
def test_tied_embeddings_get_the_sum_of_both_gradients(case: Case) -> None:
    """One parameter that embeds the tokens and is the head. Both gradients at once, neither twice."""
    data, tokens = case.make(), torch.randint(V, SHAPE)
    table = data.pop("weight")
    del data["hidden"]

    def tied(fn: Callable[..., torch.Tensor], embeds: bool = True, projects: bool = True) -> Any:
        def call(table: torch.Tensor, **rest: Any) -> torch.Tensor:
            embedding, head = (table if on else table.detach() for on in (embeds, projects))
            return fn(hidden=torch.tanh(embedding[tokens]), weight=head, **rest)

        return call

    given = {**data, "table": table}
    truth = evaluate(tied(case.function.equation), double(given), ("table",))[1]
    eager = evaluate(tied(case.function.equation), given, ("table",))[1]
    with case.tiles():
        got = evaluate(tied(case.call), given, ("table",))[1]
        alone = [
            evaluate(tied(case.call, **{use: False}), given, ("table",))[1]["table"] for use in ("embeds", "projects")
        ]
    assert_gradients(got, eager, truth, {"table": table, **policy(data)})
    assert_within(alone[0] + alone[1], got["table"], 32 * EPS * float(got["table"].abs().max()))


# --- tiles


@over([case for case in LINEAR if case.backend == "torch"] + cases("linear_kl"))
def test_the_chunk_size_does_not_matter(case: Case) -> None:
    """By no more than fp32 rounding, one logit at a time or everything at once."""
    data, results = case.make(), []
    for rows, columns in ((1, 1), (2, 20), (3, 36), (4, 7), (100, 1000)):
        with case.tiles(rows, columns):
            results.append(evaluate(case.call, data, case.leaves))
    for value, grads in results[1:]:
        assert_within(value, results[0][0], 16 * EPS * max(1.0, float(value.abs().max())))
        largest = max(1.0, float(grads["hidden"].abs().max()))
        assert_within(grads["hidden"], results[0][1]["hidden"], 64 * EPS * largest)


@over([*(case for case in LINEAR if case.backend == "triton"), *TILED])
def test_the_chunk_size_does_not_matter_on_triton(case: Case) -> None:
    data, results = case.make(), []
    for rows, columns in ((1, 16), (100, 1000)):
        with case.tiles(rows, columns):
            results.append(evaluate(case.call, data, case.leaves))
    (value, grads), (expected, expected_grads) = results
    assert_within(value, expected, 16 * EPS * max(1.0, float(value.abs().max())))
    for name, grad in grads.items():
        assert_within(grad, expected_grads[name], 64 * EPS * max(1.0, float(grad.abs().max())))
