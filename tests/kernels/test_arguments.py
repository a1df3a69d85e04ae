"""What may be given and what may not: None, tensors that are not plain, NumPy's numbers, ids out of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import onecard_kernels as k
from onecard_kernels import modules
from tests.kernels import test_bad_input as plain
from tests.kernels import test_preference_bad_input as preferences
from tests.kernels.backends import BACKENDS

N, D, V = 5, 8, 31
GOOD = {**plain.GOOD, **preferences.GOOD}
FUNCTIONS = pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)


@FUNCTIONS
def test_a_required_tensor_that_is_none_is_named(function: Callable[..., Any]) -> None:
    optional = {(k.ppo_loss, "old_logprobs"), (k.logits_ppo_loss, "old_logprobs"), (k.linear_ppo_loss, "old_logprobs")}
    for name, value in GOOD[function].items():
        if not isinstance(value, Tensor) or (function, name) in optional:
            continue
        with pytest.raises(ValueError, match=f"^{name} is None, expected a tensor"):
            function(**{**GOOD[function], name: None})


def tokens(dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.tensor([1, 1, 0, 1, 1]).bool()
    return {"advantages": torch.randn(N, dtype=dtype), "mask": mask, "weights": torch.rand(N, dtype=dtype)}


def result(loss: k.Loss, leaf: Tensor) -> list[Tensor]:
    return [loss.loss.detach(), *torch.autograd.grad(loss.loss, leaf), *loss.metrics.values()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_old_logprobs_means_the_policys_own(dtype: torch.dtype, backend: str) -> None:
    """Bit for bit what their detached copy gives, with a target of no probability among them."""
    given = {**tokens(dtype), "dual_clip": 2.0, "backend": backend}
    logprobs = (-3 * torch.rand(N)).to(dtype)
    logprobs[1] = float("-inf")
    logprobs.requires_grad_()
    own = result(k.ppo_loss(logprobs, None, **given), logprobs)
    copied = result(k.ppo_loss(logprobs, logprobs.detach(), **given), logprobs)
    assert all(map(torch.equal, own, copied))
    assert own[1].abs().max() > 0.01

    logits, targets = torch.randn(N, V, dtype=dtype).requires_grad_(), torch.randint(V, (N,))
    old = k.selective_log_softmax(logits, targets, backend=backend).logprobs.detach()
    own = result(k.logits_ppo_loss(logits, targets, None, **given, entropy_coef=0.1), logits)
    copied = result(k.logits_ppo_loss(logits, targets, old, **given, entropy_coef=0.1), logits)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(own, copied, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
def test_no_old_logprobs_from_hidden_states(trained: bool, backend: str) -> None:
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    leaf = weight.requires_grad_() if trained else hidden.requires_grad_()
    given = {**tokens(torch.float32), "backend": backend}
    old = k.linear_logprobs(hidden, weight, targets).logprobs.detach()
    loss = k.linear_ppo_loss(hidden, weight, targets, None, **given)
    assert loss.metrics["val/ratio"] == 1.0
    assert loss.metrics["policy/approxkl"] == 0.0
    for got, expected in zip(
        result(loss, leaf), result(k.linear_ppo_loss(hidden, weight, targets, old, **given), leaf), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def quantized_by_bitsandbytes(kind: str) -> Tensor:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if kind == "Params4bit":
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        return layer.to("cpu").weight
    return bitsandbytes.nn.Int8Params(torch.randn(V, D), requires_grad=False, has_fp16_weights=False).to("cpu")


# Weights that are no plain dense tensors, and what their message names.
ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "a wrapper": (lambda: TwoTensor(torch.randn(V, D), torch.randn(V, D)), "a TwoTensor, expected a plain dense"),
    "a parameter of one": (lambda: nn.Parameter(TwoTensor(torch.randn(V, D), torch.randn(V, D))), "a TwoTensor"),
    "4 bits": (lambda: quantized_by_bitsandbytes("Params4bit"), "a Params4bit of torch.uint8 .quantized., expected a"),
    "8 bits": (lambda: quantized_by_bitsandbytes("Int8Params"), "a Int8Params of torch.int8 .quantized., expected a"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.randn(V, D), 0.1, 0, torch.qint8), "quantized, expected a"),
    "sparse": (lambda: torch.randn(V, D).to_sparse(), "of layout torch.sparse_coo, expected a plain dense tensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.randn(3, D), torch.randn(2, D)]), "nested, expected a plain"),
    "fp8": (lambda: torch.randn(V, D).to(torch.float8_e4m3fn), "torch.float8_e4m3fn, expected 16 bits or more"),
}


@pytest.mark.parametrize("kind", ODD)
def test_weights_that_are_not_plain_are_refused(kind: str) -> None:
    make, words = ODD[kind]
    hidden, targets = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))
    weight = make()
    numbers = torch.ones(N)
    calls: list[Callable[[], Any]] = [
        lambda: k.linear_logprobs(hidden, weight, targets),
        lambda: k.linear_kl(hidden, hidden.detach(), weight),
        lambda: k.linear_ppo_loss(hidden, weight, targets, None, numbers, numbers),
        lambda: k.linear_dpo_loss(hidden, weight, targets, torch.tensor([0, 0, 1, 1, -1]), torch.zeros(2)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"^weight (is|has dtype) {words}"):
            call()


def test_tensors_without_numbers_and_buffers_are_plain() -> None:
    weight, hidden = nn.Buffer(torch.randn(V, D)), nn.Parameter(torch.randn(N, D))
    assert k.linear_logprobs(hidden, weight, torch.zeros(N).long()).logprobs.shape == (N,)
    with FakeTensorMode():
        fake = k.linear_logprobs(torch.empty(N, D), torch.empty(V, D), torch.empty(N).long())
    assert fake.logprobs.shape == (N,)


# Each function's numbers. Whole ones where it takes these.
NUMBERS: dict[Callable[..., Any], dict[str, float]] = {
    k.linear_logprobs: {"temperature": 0.5, "logit_scale": 2.0, "softcap": 8.0},
    k.selective_log_softmax: {"temperature": 0.5},
    k.linear_kl: {"temperature": 0.5, "logit_scale": 2.0, "softcap": 8.0},
    k.ppo_loss: {"clip_low": 0.25, "clip_high": 0.5, "dual_clip": 4.0, "normalizer": 8.0},
    k.logits_ppo_loss: {"temperature": 0.5, "clip_low": 0.25, "entropy_coef": 0.125, "normalizer": 8.0},
    k.linear_ppo_loss: {"temperature": 0.5, "softcap": 8.0, "clip_high": 0.5, "entropy_coef": 0.125, "normalizer": 8.0},
    k.value_loss: {"clip": 0.25, "normalizer": 8.0},
    k.gae: {"gamma": 0.5, "lam": 0.25},
    k.group_advantages: {"group_size": 2, "eps": 0.25},
    k.masked_whiten: {"eps": 0.25},
    k.sequence_sums: {"num_sequences": 2},
    k.dpo_loss: {"beta": 0.5, "label_smoothing": 0.25, "f_alpha_divergence_coef": 0.5, "normalizer": 8.0},
    k.linear_dpo_loss: {"beta": 0.5, "label_smoothing": 0.25, "temperature": 0.5, "normalizer": 8.0},
    k.simpo_loss: {"beta": 0.5, "gamma": 0.25, "label_smoothing": 0.25, "normalizer": 8.0},
    k.orpo_loss: {"beta": 0.5, "normalizer": 8.0},
    k.cpo_loss: {"beta": 0.5, "cpo_alpha": 0.25, "label_smoothing": 0.25, "normalizer": 8.0},
    k.kto_loss: {"beta": 0.5, "desirable_weight": 0.25, "undesirable_weight": 2.0, "normalizer": 8.0},
}
KINDS: dict[str, Callable[[float], Any]] = {
    "float32": lambda x: np.int32(x) if isinstance(x, int) else np.float32(x),
    "float64": lambda x: np.int64(x) if isinstance(x, int) else np.float64(x),
    "0-d array": np.array,
    "0-d tensor": torch.tensor,
}


def values(out: Any) -> list[Tensor]:
    parts = out if isinstance(out, tuple) else (out,)
    parts = [*parts[:-1], *parts[-1].values()] if isinstance(out, k.Loss) else parts
    return [x for x in parts if isinstance(x, Tensor)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", NUMBERS, ids=lambda f: f.__name__)
def test_numbers_of_numpy_and_torch_are_numbers(function: Callable[..., Any], kind: str) -> None:
    expected = function(**{**GOOD[function], **NUMBERS[function]})
    for name, x in NUMBERS[function].items():
        got = function(**{**GOOD[function], **NUMBERS[function], name: KINDS[kind](x)})
        assert all(map(torch.equal, values(got), values(expected))), name


MODULES = {module.__doc__.split("`")[1]: module for module in (getattr(modules, name) for name in modules.__all__)}
CHOICES: dict[str, dict[str, Any]] = {
    "token_kl": {"estimator": "k1"},
    "group_advantages": {"kind": "rloo"},
    "ppo_loss": {"kl_estimator": "k2", "kl_coef": 0.2},
    "dpo_loss": {"loss_type": "hinge"},
    "cpo_loss": {"loss_type": "ipo"},
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_same_functions(name: str) -> None:
    """Options at construction or the function's own defaults, tensors at the call, and no parameters."""
    function = getattr(k, name)
    good = {n: x + 0.1 * torch.rand_like(x) if noisy(n, x) else x for n, x in GOOD[function].items()}
    if "kl_coef" in NUMBERS.get(function, {}) | CHOICES.get(name, {}):
        good["ref_logprobs"] = good["old_logprobs"] - 0.3
    if "entropy_coef" in NUMBERS.get(function, {}) and "logprobs" in good:
        good["entropy"] = torch.rand(len(good["mask"]))
    for asked in ({}, NUMBERS.get(function, {}) | CHOICES.get(name, {})):
        given = good | asked
        options = {n: given.pop(n) for n in MODULES[name].__signature__.parameters if n in given}
        module, expected = MODULES[name](**options), values(function(**given, **options))
        assert all(map(torch.equal, values(module(**given)), expected))
        assert all(f"{n}={x!r}" in repr(module) for n, x in options.items())
        assert list(module.parameters()) == []


def noisy(name: str, x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and name != "mask"


def test_a_number_that_would_lose_its_gradient_is_refused() -> None:
    temperature = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=r"^temperature is tensor.*expected a finite number above 0"):
        k.selective_log_softmax(torch.randn(N, V), torch.arange(N), temperature=temperature)
    with pytest.raises(ValueError, match=r"^temperature is .*expected a finite number above 0"):
        k.selective_log_softmax(torch.randn(N, V), torch.arange(N), temperature=np.bool_(True))


def test_kto_takes_trls_kl_and_labels() -> None:
    logps, ref, labels = -torch.rand(4), -torch.rand(4), torch.tensor([1, 0, 0, 1])
    expected = k.kto_loss(logps, ref, labels.bool(), torch.tensor(0.3))
    for desirable in (labels, labels.to(torch.uint8), labels.bool()):
        got = k.kto_loss(logps, ref, desirable, torch.tensor([0.3]))
        assert torch.equal(got.loss, expected.loss)
        assert all(torch.equal(got.metrics[name], x) for name, x in expected.metrics.items())
        assert {x.shape for x in got.metrics.values()} == {()}
    with pytest.raises(ValueError, match=r"^desirable holds -1, expected only 0 and 1"):
        k.kto_loss(logps, ref, 2 * labels - 1, torch.tensor(0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_loss_without_clip_needs_no_old_values(backend: str) -> None:
    values, returns, mask = torch.randn(N, requires_grad=True), torch.randn(N), torch.tensor([1, 1, 0, 1, 1])
    loss = k.value_loss(values, None, returns, mask, clip=None, backend=backend)
    with_old = k.value_loss(values, torch.randn(N), returns, mask, clip=None, backend=backend)
    assert all(map(torch.equal, result(loss, values), result(with_old, values)))
    truth = (0.5 * (values - returns).square() * mask).sum() / 4
    assert torch.allclose(loss.loss, truth, rtol=1e-6)


OUTSIDE: dict[str, Callable[[Tensor, str], Any]] = {
    "linear_logprobs": lambda y, backend: k.linear_logprobs(torch.ones(N, D), torch.ones(V, D), y, backend=backend),
    "selective_log_softmax": lambda y, backend: k.selective_log_softmax(torch.ones(N, V), y, backend=backend),
    "logits_ppo_loss": lambda y, backend: k.logits_ppo_loss(
        torch.ones(N, V), y, None, torch.ones(N), torch.ones(N), backend=backend
    ),
    "linear_ppo_loss": lambda y, backend: k.linear_ppo_loss(
        torch.ones(N, D), torch.ones(V, D), y, None, torch.ones(N), torch.ones(N), backend=backend
    ),
    "linear_dpo_loss": lambda y, backend: k.linear_dpo_loss(
        torch.ones(N, D), torch.ones(V, D), y, torch.tensor([0, 1, 0, 1, 1]), torch.zeros(2), backend=backend
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_an_id_outside_of_the_vocabulary_is_an_error(name: str, compiled: bool, backend: str) -> None:
    """-100 too, where no mask covers it: a token that is skipped would still be counted by who divides by tokens."""
    call = OUTSIDE[name]
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager")
    for wrong in (-100, V, -1):
        with pytest.raises(ValueError, match=f"targets holds {wrong}, expected ids from 0 to {V - 1} wherever mask is"):
            call(torch.tensor([0, wrong, 2, 3, V - 1]), backend)


def test_in_place_gradients_have_the_same_checks() -> None:
    with pytest.raises(ValueError, match="targets holds -100"):
        k.selective_log_softmax(torch.ones(2, V), torch.tensor([1, -100]), inplace_backward=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_ppo_loss", "linear_dpo_loss"])
def test_a_head_that_zero_3_emptied_is_named(name: str, compiled: bool) -> None:
    """DeepSpeed's own way: `param.data` becomes an empty tensor, before the forward or between it and the backward."""
    hidden, weight, targets = torch.randn(N, D), nn.Parameter(torch.randn(V, D)), torch.arange(N)
    ones = torch.ones(N)
    calls: dict[str, Callable[[], Tensor]] = {
        "linear_logprobs": lambda: k.linear_logprobs(hidden, weight, targets).logprobs.sum(),
        "linear_ppo_loss": lambda: k.linear_ppo_loss(hidden, weight, targets, None, ones, ones).loss,
        "linear_dpo_loss": lambda: (
            k.linear_dpo_loss(hidden, weight, targets, torch.tensor([0, 1, 0, 1, 1]), torch.zeros(2)).loss
        ),
    }
    call = calls[name]
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager")
    loss = call()
    weight.data = torch.empty(0)
    if not (
        compiled and name == "linear_ppo_loss"
    ):  # its compiled backward reads no weight: autograd refuses the shape
        with pytest.raises(
            ValueError, match=r"^weight has shape \(0,\) in the backward, .*GatheredParameters\(weight\)"
        ):
            loss.backward()
    with pytest.raises(ValueError, match=r"weight has shape \(0,\), expected \[V, D\]: .*GatheredParameters\(weight\)"):
        calls[name]()


def test_a_reference_head_that_zero_3_emptied_is_named() -> None:
    with pytest.raises(ValueError, match=r"^ref_weight has shape \(0,\), expected \[V, D\]: ZeRO-3"):
        k.linear_kl(torch.ones(N, D), torch.ones(N, D), torch.ones(V, D), ref_weight=torch.empty(0))
