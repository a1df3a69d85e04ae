"""Named regression tests that apply only to the `linear_*` functions: trained LM heads, and tile sizes.

The table of all named regression tests is at the top of test_regressions.py.
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
    double,
    evaluate,
    over,
    poison_masked,
)

pytest.importorskip("triton", reason="triton is not installed")

# --- trained LM heads


@over(LINEAR)
def test_a_trained_head(case: Case) -> None:
    """The gradients of hidden, weight and bias, all three at once and of weight or bias alone."""
    upstream = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.5, -1.0]])
    data = {**case.make(), "bias": torch.randn(V)}
    for leaves in (("hidden", "weight", "bias"), ("weight",), ("bias",)):
        with case.tiles():
            compare(case, data, upstream, leaves=leaves, tolerance=2 * case.tolerance, temperature=0.7, logit_scale=0.8)


@over(cases("linear_kl"))
def test_linear_kl_refuses_a_trained_head(case: Case) -> None:
    data = case.make()
    with pytest.raises(ValueError, match="weight requires a gradient"):
        case.call(**{**data, "weight": data["weight"].requires_grad_()})


@over(LINEAR)
def test_a_head_wrapped_in_lora(case: Case) -> None:
    """The head W + BA of peft, with W frozen: the gradients of B and A are compared with eager's."""
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
    trained = {n: p for n, p in head.named_parameters() if p.requires_grad}
    assert len(trained) == 2

    def gradients(fn: Callable[..., torch.Tensor], data: dict[str, Any]) -> dict[str, torch.Tensor]:
        weight = head.base_layer.weight + head.get_delta_weight("default")
        value = fn(**{**data, "weight": weight.to(data["hidden"].dtype)})
        return dict(zip(trained, torch.autograd.grad(value.sum(), list(trained.values())), strict=True))

    with case.tiles():
        got = gradients(case.call, poison_masked(data))
    eager = gradients(case.function.equation, data)
    # Copies in fp32: `head.double()` changes the parameters, and each gradient must have its parameter's dtype.
    parameters = {name: parameter.detach().clone() for name, parameter in trained.items()}
    head.double()
    trained = {n: p for n, p in head.named_parameters() if p.requires_grad}
    truth = gradients(case.function.equation, double(data))
    assert_gradients(got, eager, truth, {**parameters, **old_logprobs_of(data)})


def old_logprobs_of(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entry `old_logprobs`, where a function takes one: `assert_gradients` allows for its rounding."""
    return {name: data[name] for name in ("old_logprobs",) if name in data}


@over(LINEAR)
def test_tied_embeddings_get_the_sum_of_both_gradients(case: Case) -> None:
    """One parameter is embedding and head: its gradient is the sum of the gradients of both uses, each added once."""
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
        without_embedding, without_head = (
            evaluate(tied(case.call, **{use: False}), given, ("table",))[1]["table"] for use in ("embeds", "projects")
        )
    assert_gradients(got, eager, truth, {"table": table, **old_logprobs_of(data)})
    assert_within(without_embedding + without_head, got["table"], 32 * EPS * float(got["table"].abs().max()))


# --- tile sizes


@over([case for case in LINEAR if case.backend == "torch"] + cases("linear_kl"))
def test_the_chunk_size_does_not_matter(case: Case) -> None:
    """Results for tiles of one logit up to one tile of all logits differ by at most fp32 rounding."""
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
