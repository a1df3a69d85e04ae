"""Every registered operator keeps torch's rules, every formula's gradient is that of its value, none has a second."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

import onecard_kernels
from onecard_kernels import (
    dispatch,
    launch,
    linear_dpo_loss,
    linear_kl,
    linear_logprobs,
    linear_ppo_loss,
    logits_ppo_loss,
    ppo_loss,
    selective_log_softmax,
    value_loss,
)
from onecard_kernels.kl import linear as kl_linear
from onecard_kernels.logprob import ops, plans, selective
from onecard_kernels.ppo import fused_logits, local_ops

N, D, V = 5, 3, 11
TRITON = launch.why_not(torch.device("cpu")) is None
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="triton does not run here"))]

for function, backends in dispatch.TABLE.items():  # every file that registers one
    for backend in backends if TRITON else ("torch",):
        dispatch.implementation(function, backend, torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with plans.override(rows=3, columns=4):
        yield


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def head() -> tuple[Tensor, Tensor, float, float, float]:
    """bias, forbidden, temperature, logit_scale, softcap"""
    return torch.randn(V), torch.arange(V) == 2, 0.7, 1.2, 5.0


MASK = torch.tensor([1, 0, 1, 1, 1])
TARGETS = torch.tensor([0, 1, 3, V - 1, V - 1])
NO_HEAD = (None, None, 1.0, 1.0, None)
Cases = Iterator[tuple[Any, ...]]


def linear_logprobs_cases(backend: str) -> Cases:
    bias, *rest = head()
    yield leaf(N, D), torch.randn(V, D), TARGETS, None, *NO_HEAD, False, False, False, "frozen", backend
    yield leaf(N, D), torch.randn(V, D), TARGETS, MASK, bias, *rest, True, True, True, "frozen", backend
    yield leaf(N, D), leaf(V, D), TARGETS, MASK, bias.requires_grad_(), *rest, True, True, False, "trained", backend
    yield torch.randn(N, D), leaf(V, D), TARGETS, None, *NO_HEAD, True, False, False, "trained", backend
    half = torch.randn(1, N, D).half()
    yield half, torch.randn(V, D), TARGETS[None], MASK.bool()[None], *NO_HEAD, True, False, True, "forward", backend
    yield torch.randn(0, D), torch.randn(V, D), TARGETS[:0], None, *NO_HEAD, True, False, False, "forward", backend


def recompute_cases(backend: str) -> Cases:
    hidden, weight, (bias, forbidden, *numbers) = torch.randn(N, D), torch.randn(V, D), head()
    given = (hidden, weight, TARGETS, MASK, bias, forbidden)
    saved = ops._forward(*given, *numbers, True, True, False, "trained", backend)[-1]
    yield *given, saved, torch.randn(N), torch.randn(N), *numbers, True, True, True, backend
    yield *given, saved, None, torch.randn(N), *numbers, False, True, False, backend
    yield *given, saved, torch.randn(N), None, *numbers, True, False, True, backend


def scale_directions_cases(backend: str) -> Cases:
    possible, direction = torch.tensor([1, 1, 0, 1, 1]).bool(), torch.randn(N, D)
    yield MASK, possible, direction, torch.randn(N, D), torch.randn(N), torch.randn(N)
    yield None, possible, direction.bfloat16(), torch.empty(0), torch.randn(N), None
    yield None, possible, direction, torch.randn(N, D), None, torch.randn(N)


def linear_ppo_cases(backend: str) -> Cases:
    tokens = (torch.randn(N) - 2, torch.randn(N), MASK)
    clip = (0.2, 0.3, 2.0, 0.1, 0.2, "k3")
    bias, *rest = head()
    weight = torch.randn(V, D)
    yield leaf(N, D), weight, TARGETS, *tokens, None, None, *NO_HEAD, *clip, [True, False, False], backend
    full = (torch.randn(N) - 2, torch.rand(N), bias, *rest, 0.2, 0.2, None, 0.0, 0.0, "k1")
    yield leaf(N, D), leaf(V, D), TARGETS, *tokens, *full, [True, True, False], backend
    full = (torch.randn(N) - 2, torch.rand(N), bias.clone().requires_grad_(), *rest, *clip)
    yield torch.randn(N, D), leaf(V, D), TARGETS, *tokens, *full, [False, True, True], backend
    yield torch.randn(N, D), weight, TARGETS, *tokens, None, None, *NO_HEAD, *clip, [False] * 3, backend


def scale_linear_ppo_cases(backend: str) -> Cases:
    fp32, bf16 = torch.float32, torch.bfloat16
    yield torch.randn(N, D), torch.randn(V, D), torch.randn(V), torch.tensor(0.3), fp32, bf16, fp32
    nothing = torch.empty(0)
    yield torch.randn(N, D), nothing, nothing, torch.tensor(0.3, dtype=torch.float64), torch.float16, fp32, fp32


def linear_kl_cases(backend: str) -> Cases:
    hidden, ref, weight = torch.randn(N, D), torch.randn(N, D), torch.randn(V, D)
    bias, *rest = head()
    yield leaf(N, D), ref, weight, None, None, None, None, None, 1.0, 1.0, None, True, backend
    yield leaf(N, D), torch.randn(N, 2), weight, torch.randn(V, 2), MASK, bias, bias + 1, *rest, True, backend
    yield hidden.half(), ref, weight, None, MASK.bool(), None, None, None, 1.0, 1.0, None, False, backend


def selective_forward_cases(backend: str) -> Cases:
    yield leaf(N, V), TARGETS, MASK, 0.7, True, backend
    yield leaf(N, V, dtype=torch.bfloat16), TARGETS, None, 1.0, False, backend


def selective_backward_cases(backend: str) -> Cases:
    logits = torch.randn(N, V)
    stats = selective._forward_op(logits, TARGETS, MASK, 0.7, True, backend)[2]
    yield logits, TARGETS, MASK, stats, torch.randn(N), torch.randn(N), 0.7, backend
    yield logits, TARGETS, MASK, stats, torch.randn(N), None, 0.7, backend
    yield logits, TARGETS, MASK, stats, None, torch.randn(N), 0.7, backend


def ppo_cases(backend: str) -> Cases:
    tokens, off = (torch.randn(N), torch.randn(N), MASK), (None, None, None)
    options = (0.2, 0.3, None, 0.1, 0.2, "k3")
    ref = (torch.randn(N), torch.rand(N))
    yield leaf(N), *tokens, leaf(N), *ref, None, 4.0, *options, True, True
    yield leaf(N), *tokens, *off, torch.tensor(3.0), None, *options[:2], 2.0, 0.0, 0.0, "k1", True, False
    yield (
        torch.randn(N).half(),
        *tokens,
        torch.rand(N),
        None,
        None,
        None,
        None,
        *options[:3],
        0.0,
        0.0,
        "k2",
        *[False] * 2,
    )


def value_cases(backend: str) -> Cases:
    yield leaf(N), torch.randn(N), torch.randn(N), MASK, torch.rand(N), None, 2.0, 0.2, True
    yield torch.randn(N), torch.randn(N).half(), torch.randn(N), MASK.bool(), None, torch.tensor(3), None, None, False


def scale_cases(backend: str) -> Cases:
    one = torch.tensor(2.0)
    yield one, one, torch.randn(N), torch.empty(0), torch.bfloat16, torch.float32
    yield one, one, torch.randn(N), torch.randn(N), torch.float32, torch.float16


def logits_ppo_cases(backend: str) -> Cases:
    tokens = (torch.randn(N) - 2, torch.randn(N), MASK)
    numbers = (0.7, 0.2, 0.2, 2.0, 0.1, 0.1, "k3")
    yield leaf(N, V), TARGETS, *tokens, torch.randn(N), torch.rand(N), None, 6.0, *numbers
    yield leaf(N, V), TARGETS, *tokens, None, None, torch.tensor(3.0), None, *numbers[:3], None, 0.0, 0.0, "k1"


def logits_ppo_backward_cases(backend: str) -> Cases:
    for logits, *rest in logits_ppo_cases(backend):
        out = [x.detach() for x in fused_logits._forward_op(logits.detach(), *rest)]
        yield logits.detach(), TARGETS, MASK, *out[2:], torch.tensor(1.5), 0.7


def gae_cases(backend: str) -> Cases:
    rewards, values, mask = torch.randn(2, N), torch.randn(2, N), torch.stack([MASK, 1 - MASK])
    yield rewards, values, mask.bool(), torch.randn(2), 0.9, 0.8
    yield rewards.bfloat16(), values.T.contiguous().T, mask, None, 1.0, 1.0


def gae_operators() -> list[CustomOpDef]:
    files = [sys.modules.get(f"onecard_kernels.advantages.{name}") for name in ("scan", "triton")]
    return [op for file in files if file for op in vars(file).values() if is_operator(op)]


def is_operator(value: object) -> bool:
    return isinstance(value, CustomOpDef)


BOTH: list[tuple[CustomOpDef, Callable[[str], Cases]]] = [
    (ops._forward, linear_logprobs_cases),
    (ops._recompute, recompute_cases),
    (local_ops.linear_ppo, linear_ppo_cases),
    (kl_linear._forward, linear_kl_cases),
    (selective._forward_op, selective_forward_cases),
    (selective._backward_op, selective_backward_cases),
]
TORCH: list[tuple[CustomOpDef, Callable[[str], Cases]]] = [
    (ops.scale_directions, scale_directions_cases),
    (local_ops.scale_linear_ppo, scale_linear_ppo_cases),
]
TRITON_ALONE: list[tuple[CustomOpDef, Callable[[str], Cases]]] = [
    (fused_logits._forward_op, logits_ppo_cases),
    (fused_logits._backward_op, logits_ppo_backward_cases),
]
TRITON_ALONE += [(operator, gae_cases) for operator in gae_operators()]
if TRITON:
    from onecard_kernels.ppo import ops as ppo_ops

    TRITON_ALONE += [(ppo_ops._policy, ppo_cases), (ppo_ops._value, value_cases), (ppo_ops._scale, scale_cases)]
COVERED = [*BOTH, *TORCH, *TRITON_ALONE]


def name_of(value: object) -> str:
    return str(getattr(value, "_qualname", value)).replace("onecard::", "")


def check(operator: CustomOpDef, cases: Callable[[str], Cases], backend: str) -> None:
    # Not by the object alone: what matters is whom the name calls.
    registered = getattr(torch.ops.onecard, name_of(operator)).default
    first, *others = cases(backend)
    torch.library.opcheck(registered, first)
    for arguments in others:  # what changes with the options; tracing is most of the time
        torch.library.opcheck(registered, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: name_of(case[0]))
def test_operators_of_both_backends(case: tuple[CustomOpDef, Callable[[str], Cases]], backend: str) -> None:
    check(*case, backend)


@pytest.mark.parametrize("case", TORCH, ids=lambda case: name_of(case[0]))
def test_operators_of_torch(case: tuple[CustomOpDef, Callable[[str], Cases]]) -> None:
    check(*case, "torch")


@pytest.mark.skipif(not TRITON, reason="triton does not run here")
@pytest.mark.parametrize("case", TRITON_ALONE, ids=lambda case: name_of(case[0]))
def test_operators_of_triton(case: tuple[CustomOpDef, Callable[[str], Cases]]) -> None:
    check(*case, "triton")


@pytest.mark.skipif(not TRITON, reason="triton does not run here")
def test_no_operator_is_left_out() -> None:
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("onecard::")}
    assert {operator._qualname for operator, _ in COVERED} == registered


def test_no_name_is_registered_twice() -> None:
    """The second registration replaces the first one without a word, and the first one's callers call the second."""
    source = "".join(file.read_text() for file in Path(onecard_kernels.__file__).parent.rglob("*.py"))
    counts = Counter(re.findall(r'custom_op\(\s*"(onecard::\w+)"', source))
    assert len(counts) >= 10
    assert {name: count for name, count in counts.items() if count > 1} == {}


# ---------------------------------------------------------------------------------------------------------------------
# first derivatives

FLOATS = {"dtype": torch.float64}


def policy_batch() -> dict[str, Tensor]:
    """Log-ratios away from log 0.8, log 1.3 and 0, so that a finite difference crosses no kink."""
    d = torch.tensor([-0.7, 0.05, 0.1, -0.1, 0.6], **FLOATS)
    return {
        "d": d,
        "advantages": torch.tensor([1.0, -1.5, 0.7, 0.4, -0.9], **FLOATS),
        "mask": MASK,
        "weights": torch.tensor([0.5, 1.0, 2.0, 1.5, 0.3], **FLOATS),
    }


def head_options() -> dict[str, Any]:
    _, forbidden, temperature, scale, softcap = head()
    return {"forbidden": forbidden, "temperature": temperature, "logit_scale": scale, "softcap": softcap}


def gradcheck(fn: Any, inputs: tuple[Tensor, ...], backend: str) -> bool:
    """Along one random direction for Triton: its interpreter takes milliseconds a program."""
    return torch.autograd.gradcheck(fn, inputs, fast_mode=backend == "triton")


LOSS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.3, "entropy_coef": 0.2}


@pytest.mark.parametrize("implementation", ["chunked", "low_memory", "tiled"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck_of_linear_logprobs(implementation: str, train: bool, entropy: bool) -> None:
    """fp64 takes the torch passes on either backend."""
    hidden, weight, bias = leaf(N, D, **FLOATS), leaf(V, D, **FLOATS), leaf(V, **FLOATS)
    if not train:
        weight, bias = weight.detach(), bias.detach()

    def run(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = linear_logprobs(
            h, w, TARGETS, bias=b, mask=MASK, entropy_requires_grad=entropy, **head_options(), backend="auto"
        )
        return out[:2] if entropy else out[:1]

    with plans.override(implementation=implementation, rows=3, columns=4 if implementation == "low_memory" else None):
        assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("implementation", ["chunked", "low_memory"])
def test_gradcheck_of_linear_ppo_loss(backend: str, train: bool, implementation: str) -> None:
    hidden, weight, bias = (leaf(*shape, **FLOATS) for shape in ((N, D), (V, D), (V,)))
    if not train:
        weight, bias = weight.detach(), bias.detach()
    batch = policy_batch()
    with torch.no_grad():
        logp = linear_logprobs(hidden, weight, TARGETS, bias=bias, **head_options()).logprobs

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_ppo_loss(
            *(h, w, TARGETS, logp - batch["d"], batch["advantages"], MASK),
            **LOSS,
            **head_options(),
            dual_clip=1.2,
            bias=b,
            ref_logprobs=logp - 0.4,
            weights=batch["weights"],
            backend=backend,
        ).loss

    with plans.override(implementation=implementation, rows=3, columns=4 if implementation == "low_memory" else None):
        assert gradcheck(run, (hidden, weight, bias), backend)


@pytest.mark.parametrize("other_head", [False, True])
def test_gradcheck_of_linear_kl(other_head: bool) -> None:
    ref, weight, bias = (torch.randn(*shape, **FLOATS) for shape in ((N, D), (V, D), (V,)))
    more = {"ref_weight": torch.randn(V, D, **FLOATS), "ref_bias": torch.randn(V, **FLOATS)} if other_head else {}

    def run(h: Tensor) -> Tensor:
        return linear_kl(h, ref, weight, bias=bias, mask=MASK, **head_options(), **more)

    assert torch.autograd.gradcheck(run, (leaf(N, D, **FLOATS),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_functions_of_logits(backend: str) -> None:
    logits, batch = leaf(N, V, **FLOATS), policy_batch()
    with torch.no_grad():
        logp = selective_log_softmax(logits, TARGETS, temperature=0.7).logprobs

    def both(x: Tensor) -> tuple[Tensor, ...]:
        kw = {"temperature": 0.7, "mask": MASK, "backend": backend}
        return selective_log_softmax(x, TARGETS, entropy_requires_grad=True, **kw)[:2]

    def loss(x: Tensor) -> Tensor:
        old = (logp - batch["d"], batch["advantages"], MASK)
        kw = {"temperature": 0.7, "ref_logprobs": logp - 0.4, "weights": batch["weights"], "backend": backend}
        return logits_ppo_loss(x, TARGETS, *old, **LOSS, **kw).loss

    assert gradcheck(both, (logits,), backend)
    assert gradcheck(loss, (logits,), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_of_functions_of_logprobs(backend: str, estimator: str) -> None:
    logp, entropy, batch = leaf(N, **FLOATS), leaf(N, **FLOATS), policy_batch()
    old, ref = logp.detach() - batch["d"], logp.detach() - 0.4

    def policy(x: Tensor, h: Tensor) -> Tensor:
        kw = {"ref_logprobs": ref, "kl_estimator": estimator, "weights": batch["weights"], "backend": backend}
        return ppo_loss(x, old, batch["advantages"], MASK, entropy=h, dual_clip=1.2, **LOSS, **kw).loss

    assert gradcheck(policy, (logp, entropy), backend)
    values = torch.tensor([0.5, -0.3, 1.2, -0.9, 0.05], **FLOATS).requires_grad_()
    was, target = torch.zeros(N, **FLOATS), torch.tensor([0.7, -0.1, -0.4, 0.3, 0.4], **FLOATS)

    def fit(v: Tensor) -> Tensor:
        return value_loss(v, was, target, MASK, clip=0.2, weights=batch["weights"], backend=backend).loss

    assert gradcheck(fit, (values,), backend)


# ---------------------------------------------------------------------------------------------------------------------
# second derivatives: a gradient that was formed in the forward is a constant for autograd


Derived = tuple[Tensor, Tensor]  # a loss, and the leaf it is a function of


def sampled() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N) - 2, torch.rand(N) + 0.5, MASK


def of_hidden(loss: Callable[..., Tensor], trained: bool = False) -> Callable[[str], Derived]:
    def derived(backend: str) -> Derived:
        hidden, weight = leaf(N, D), torch.randn(V, D).requires_grad_(trained)
        return loss(hidden, weight, backend), weight if trained else hidden

    return derived


def of_tokens(loss: Callable[..., Tensor], *more: int) -> Callable[[str], Derived]:
    def derived(backend: str) -> Derived:
        x = leaf(N, *more)
        return loss(x, backend), x

    return derived


def logprobs_of(h: Tensor, w: Tensor, backend: str) -> Tensor:
    return linear_logprobs(h, w, TARGETS, backend=backend).logprobs


def ppo_of(h: Tensor, w: Tensor, backend: str) -> Tensor:
    return linear_ppo_loss(h, w, TARGETS, *sampled(), backend=backend).loss


def dpo_of(h: Tensor, w: Tensor, backend: str) -> Tensor:
    ids, ref = torch.tensor([0, 0, 1, 1, -1]), torch.tensor([-1.0, -2.0])
    return linear_dpo_loss(h, w, TARGETS, ids, ref, backend=backend).loss


def selective_of(x: Tensor, backend: str, inplace: bool = False) -> Tensor:
    return selective_log_softmax(x * 1, TARGETS, inplace_backward=inplace, backend=backend).logprobs.sum()


SECOND: dict[str, Callable[[str], Derived]] = {
    "frozen": of_hidden(lambda h, w, b: logprobs_of(h, w, b).sum()),
    "frozen, of a curved loss": of_hidden(lambda h, w, b: logprobs_of(h, w, b).exp().sum()),
    "trained": of_hidden(lambda h, w, b: logprobs_of(h, w, b).sum(), trained=True),
    "linear_dpo_loss": of_hidden(dpo_of),
    "linear_kl": of_hidden(lambda h, w, b: linear_kl(h, torch.randn(N, D), w, backend=b).sum()),
    "linear_ppo_loss": of_hidden(ppo_of),
    "linear_ppo_loss, trained": of_hidden(ppo_of, trained=True),
    "selective_log_softmax": of_tokens(selective_of, V),
    "selective_log_softmax, in place": of_tokens(lambda x, b: selective_of(x, b, inplace=True), V),
    "logits_ppo_loss": of_tokens(lambda x, b: logits_ppo_loss(x, TARGETS, *sampled(), backend=b).loss, V),
    "ppo_loss": of_tokens(lambda x, b: ppo_loss(x, x.detach(), *sampled()[1:], backend=b).loss),
    "value_loss": of_tokens(lambda x, b: value_loss(x, x.detach() + 0.05, torch.randn(N), MASK, backend=b).loss),
}
AUTOGRAD_S_OWN = ("ppo_loss", "value_loss")  # in torch these are formulas, and have all derivatives


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_is_refused(name: str, backend: str) -> None:
    """Left out of a sum in silence, as a constant's, it would be a wrong number."""
    loss, x = SECOND[name](backend)
    if backend == "torch" and name in AUTOGRAD_S_OWN:
        assert torch.autograd.grad(loss, x, create_graph=True)[0].requires_grad
        return
    with pytest.raises(RuntimeError):  # noqa: PT012
        gradient = torch.autograd.grad(loss, x, create_graph=True)[0]
        (gradient.square().sum() + x.square().sum()).backward()
