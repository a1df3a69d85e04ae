"""Forward-mode AD and torch.func: the right derivative, or an error that names the function. Never a silent 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import onecard_kernels as k
from onecard_kernels import modules
from tests.kernels.backends import needs_triton

N, D, V, B = 6, 4, 11, 4
Named = dict[str, Any]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs() -> dict[str, tuple[Callable[..., Tensor], Named, set[str]]]:
    """A 0-d result of each public function, its inputs, and those by which forward mode gives the right derivative."""
    ids, mask = torch.randint(V, (N,)), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    hidden, weight, bias, logits = numbers(N, D), numbers(V, D), numbers(V), numbers(N, V)
    logp = -3 * torch.rand(N, dtype=torch.float64)
    tokens = {"old_logprobs": logp + 0.1 * numbers(N), "advantages": numbers(N), "mask": mask}
    tokens |= {"ref_logprobs": logp + 0.3 * numbers(N), "weights": torch.rand(N).double(), "kl_coef": 0.1}
    tokens["normalizer"] = torch.tensor(5.0).double()
    sums = {name: -9 * torch.rand(B, dtype=torch.float64) for name in ("chosen_logps", "rejected_logps")}
    references = {f"ref_{name}": x + numbers(B) for name, x in sums.items()}
    lengths = {name: 2 + 3 * torch.rand(B, dtype=torch.float64) for name in ("chosen_lengths", "rejected_lengths")}
    pairs = {"weights": torch.rand(B).double(), "normalizer": torch.tensor(3.0).double()}
    sequences = torch.tensor([0, 0, 1, -1, 1, 0])
    of_head = {"weight": weight, "bias": bias}

    def square(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda **given: function(**given).square().sum()

    def loss(function: Callable[..., k.Loss]) -> Callable[..., Tensor]:
        return lambda **given: function(**given).loss

    def first(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda **given: function(**given)[0].square().sum()

    linear, logit = {"hidden": hidden, **of_head, "targets": ids}, {"logits": logits, "targets": ids}
    ppo = {"logprobs": logp, "entropy": torch.rand(N).double(), "entropy_coef": 0.1, **tokens}
    value = {"values": numbers(N), "old_values": numbers(N), "returns": numbers(N), "mask": mask}
    value |= {"weights": torch.rand(N).double()}
    rows = {
        "rewards": numbers(2, N),
        "values": numbers(2, N),
        "mask": torch.ones(2, N).bool(),
        "last_values": numbers(2),
    }
    kto = {"logps": -torch.rand(B).double(), "ref_logps": -torch.rand(B).double(), "kl": torch.tensor(0.1).double()}
    kto |= {"desirable": torch.tensor([True, False, True, True]), **pairs}
    dpo = {"hidden": hidden, **of_head, "targets": ids, "sequence_ids": sequences, "ref_logps": numbers(2)}
    kl = {"hidden": hidden, "ref_hidden": numbers(N, D), **of_head, "ref_weight": numbers(V, D), "ref_bias": numbers(V)}
    summed = {"values": logp, "sequence_ids": sequences, "num_sequences": 2}
    pair, of_pairs = {*sums}, {*sums, *lengths}
    return {
        "linear_logprobs": (first(k.linear_logprobs), linear, set()),
        "selective_log_softmax": (first(k.selective_log_softmax), logit, set()),
        "linear_kl": (square(k.linear_kl), kl, set()),
        "token_kl": (square(k.token_kl), {"logprobs": logp, "ref_logprobs": logp - 1}, {"logprobs", "ref_logprobs"}),
        "ppo_loss": (loss(k.ppo_loss), ppo, {"logprobs", "entropy"}),
        "logits_ppo_loss": (loss(k.logits_ppo_loss), {**logit, **tokens}, set()),
        "linear_ppo_loss": (loss(k.linear_ppo_loss), {**linear, **tokens}, set()),
        "value_loss": (loss(k.value_loss), value, {"values"}),
        "gae": (first(k.gae), rows, set()),
        "group_advantages": (square(k.group_advantages), {"scores": numbers(B), "group_size": 2}, set()),
        "masked_whiten": (square(k.masked_whiten), {"x": numbers(N), "mask": mask}, set()),
        "dpo_loss": (loss(k.dpo_loss), {**sums, **references, **lengths, "loss_type": "ipo", **pairs}, of_pairs),
        "simpo_loss": (loss(k.simpo_loss), {**sums, **lengths, **pairs}, of_pairs),
        "orpo_loss": (loss(k.orpo_loss), {**sums, **lengths, **pairs}, of_pairs),
        "cpo_loss": (loss(k.cpo_loss), {**sums, **pairs}, pair),
        "kto_loss": (loss(k.kto_loss), kto, {"logps"}),
        "linear_dpo_loss": (loss(k.linear_dpo_loss), dpo, set()),
        "sequence_sums": (square(k.sequence_sums), summed, {"values"}),
    }


torch.manual_seed(0)
FUNCTIONS = inputs()


def of_one(name: str, argument: str) -> Callable[[Tensor], Tensor]:
    run, given, _ = FUNCTIONS[name]
    return lambda x: run(**{**given, argument: x})


def test_every_public_function_is_here() -> None:
    of_models = {"check_head", "find_logit_transform", "read_head"}
    assert {*FUNCTIONS} == {name for name in k.__all__ if name.islower()} - of_models


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_right_or_refused(name: str) -> None:
    """By each floating input: the central difference in fp64, or an error with the function's name."""
    _, given, by = FUNCTIONS[name]
    floating = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    assert by <= {*floating}
    for argument, x in floating.items():
        f, v = of_one(name, argument), torch.randn_like(x)
        if argument not in by:
            with pytest.raises(NotImplementedError, match=rf"^{name} .*forward-mode AD"):
                torch.func.jvp(f, (x,), (v,))
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"^{name} .*{argument}"):
                f(forward_ad.make_dual(x, v))
            continue
        truth = (f(x + 1e-6 * v) - f(x - 1e-6 * v)) / 2e-6
        assert truth.abs() > 1e-4
        assert torch.allclose(torch.func.jvp(f, (x,), (v,))[1], truth, rtol=1e-5)
        with forward_ad.dual_level():
            assert torch.allclose(forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent, truth, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_grad_and_vmap_of_torch_func_are_right_or_refused(name: str) -> None:
    _, given, by = FUNCTIONS[name]
    argument = next(iter(by or given))
    x, f = given[argument], of_one(name, argument)
    batch = torch.stack([x, x * 0.9])
    of_constants = name in ("group_advantages", "masked_whiten")
    if not by and not of_constants:
        for transform in (torch.func.vmap, lambda f: torch.func.vmap(torch.func.grad(f))):
            with pytest.raises(NotImplementedError, match=rf"^{name} does not support torch\.func"):
                transform(f)(batch)
        return
    assert torch.allclose(torch.func.vmap(f)(batch), torch.stack([f(one) for one in batch]), rtol=1e-12)
    leaf = x.clone().requires_grad_()
    truth = torch.zeros_like(x) if of_constants else torch.autograd.grad(f(leaf), leaf)[0]
    assert torch.allclose(torch.func.grad(f)(x), truth, rtol=1e-12)
    assert torch.allclose(torch.func.vmap(torch.func.grad(f))(batch)[0], truth, rtol=1e-12)


@pytest.mark.parametrize("name", ["LinearLogProbs", "LinearPPOLoss", "LinearKL", "SelectiveLogSoftmax", "GAE"])
def test_modules_refuse_as_their_functions_do(name: str) -> None:
    function = {"LinearLogProbs": "linear_logprobs", "LinearPPOLoss": "linear_ppo_loss", "LinearKL": "linear_kl"}
    function |= {"SelectiveLogSoftmax": "selective_log_softmax", "GAE": "gae"}
    given = {n: x for n, x in FUNCTIONS[function[name]][1].items() if isinstance(x, Tensor)}
    module, (argument, x) = getattr(modules, name)(), next(iter(given.items()))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{function[name]} .*forward-mode AD"):
        module(**{**given, argument: forward_ad.make_dual(x, x)})


@needs_triton
@pytest.mark.parametrize("name", ["ppo_loss", "value_loss", "gae", "logits_ppo_loss"])
def test_triton_refuses_where_torch_may_not(name: str) -> None:
    run, given, _ = FUNCTIONS[name]
    argument, x = next(iter(given.items()))
    transforms = (lambda f: torch.func.jvp(f, (x,), (x,)), lambda f: torch.func.grad(f)(x))
    for transform in transforms:
        with pytest.raises(NotImplementedError, match=rf"^{name} does not support torch\.func .*forward-mode AD"):
            transform(lambda x: run(**{**given, argument: x, "backend": "triton"}))


@pytest.mark.parametrize("how", ["compiled inside", "compiled outside", "a dual input"])
def test_compiled_functions_refuse_forward_mode_too(how: str) -> None:
    """There no Python of ours runs any more: the operators ask."""
    f, x = of_one("linear_logprobs", "hidden"), numbers(N, D)

    def jvp(f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    def dual(f: Callable[[Tensor], Tensor]) -> Any:
        with forward_ad.dual_level():
            return f(forward_ad.make_dual(x, torch.ones_like(x)))

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager")
    steps = {
        "compiled inside": lambda: jvp(compiled),
        "compiled outside": torch.compile(lambda: jvp(f), backend="aot_eager"),
        "a dual input": lambda: dual(compiled),
    }
    with pytest.raises(Exception, match=r"linear_logprobs does not support .*forward-mode AD"):
        steps[how]()
