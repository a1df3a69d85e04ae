"""Every registered operator keeps torch's rules, and none has the name of another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from onecard_kernels import dispatch
from onecard_kernels.kl import linear as kl_linear
from onecard_kernels.logprob import linear, selective, tuning
from onecard_kernels.ppo import linear as ppo_linear
from onecard_kernels.ppo import triton_ops
from tests.kernels.backends import BACKENDS, TRITON, needs_triton
from tests.kernels.operator_material import MASK, TARGETS, D, N, V, head, leaf

for function, backends in dispatch.TABLE.items():  # every file that registers one
    for backend in backends if TRITON else ("torch",):
        dispatch.implementation(function, backend, torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tuning.override(rows=3, columns=4):
        yield


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
    saved = linear._forward(*given, *numbers, True, True, False, "trained", backend)[-1]
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
    own = (None, *tokens[1:])
    yield leaf(N, D), weight, TARGETS, *own, None, None, *NO_HEAD, *clip, [True, False, False], backend


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
    yield leaf(N), None, *tokens[1:], *off, None, 4.0, *options, True, False
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
    yield torch.randn(N), None, torch.randn(N), MASK.bool(), None, None, 2.0, None, False


def scale_cases(backend: str) -> Cases:
    one = torch.tensor(2.0)
    yield one, one, torch.randn(N), torch.empty(0), torch.bfloat16, torch.float32
    yield one, one, torch.randn(N), torch.randn(N), torch.float32, torch.float16


def logits_ppo_cases(backend: str) -> Cases:
    tokens = (torch.randn(N) - 2, torch.randn(N), MASK)
    numbers = (0.7, 0.2, 0.2, 2.0, 0.1, 0.1, "k3")
    yield leaf(N, V), TARGETS, *tokens, torch.randn(N), torch.rand(N), None, 6.0, *numbers
    yield leaf(N, V), TARGETS, *tokens, None, None, torch.tensor(3.0), None, *numbers[:3], None, 0.0, 0.0, "k1"
    yield leaf(N, V), TARGETS, None, *tokens[1:], None, None, None, 6.0, *numbers


def logits_ppo_backward_cases(backend: str) -> Cases:
    for logits, *rest in logits_ppo_cases(backend):
        out = [x.detach() for x in triton_ops._logits(logits.detach(), *rest)]
        yield logits.detach(), TARGETS, MASK, *out[2:], torch.tensor(1.5), 0.7


def gae_cases(backend: str) -> Cases:
    rewards, values, mask = torch.randn(2, N), torch.randn(2, N), torch.stack([MASK, 1 - MASK])
    yield rewards, values, mask.bool(), torch.randn(2), 0.9, 0.8
    yield rewards.bfloat16(), values.T.contiguous().T, mask, None, 1.0, 1.0


def gae_operators() -> list[CustomOpDef]:
    files = [sys.modules.get(f"onecard_kernels.advantages.{name}") for name in ("torch_gae", "triton")]
    return [op for file in files if file for op in vars(file).values() if is_operator(op)]


def is_operator(value: object) -> bool:
    return isinstance(value, CustomOpDef)


BOTH: list[tuple[CustomOpDef, Callable[[str], Cases]]] = [
    (linear._forward, linear_logprobs_cases),
    (linear._recompute, recompute_cases),
    (ppo_linear.linear_ppo, linear_ppo_cases),
    (kl_linear._forward, linear_kl_cases),
    (selective._forward_op, selective_forward_cases),
    (selective._backward_op, selective_backward_cases),
]
TORCH: list[tuple[CustomOpDef, Callable[[str], Cases]]] = [
    (linear.scale_directions, scale_directions_cases),
    (ppo_linear.scale_linear_ppo, scale_linear_ppo_cases),
]
TRITON_ALONE: list[tuple[CustomOpDef, Callable[[str], Cases]]] = [
    (triton_ops._logits, logits_ppo_cases),
    (triton_ops._logits_gradient, logits_ppo_backward_cases),
]
TRITON_ALONE += [(operator, gae_cases) for operator in gae_operators()]
TRITON_ALONE += [(triton_ops._policy, ppo_cases), (triton_ops._value, value_cases), (triton_ops._scale, scale_cases)]
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


@needs_triton
@pytest.mark.parametrize("case", TRITON_ALONE, ids=lambda case: name_of(case[0]))
def test_operators_of_triton(case: tuple[CustomOpDef, Callable[[str], Cases]]) -> None:
    check(*case, "triton")


@needs_triton
def test_no_operator_is_left_out() -> None:
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("onecard::")}
    assert {operator._qualname for operator, _ in COVERED} == registered


@needs_triton
@pytest.mark.parametrize("case", COVERED, ids=lambda case: name_of(case[0]))
def test_no_operator_drops_a_tangent(case: tuple[CustomOpDef, Callable[[str], Cases]]) -> None:
    """By any of its floating inputs: in a compiled graph no check of arguments comes before the operator."""
    operator, cases = case
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in next(cases("torch"))]
    for place, x in enumerate(arguments):
        if isinstance(x, Tensor) and x.is_floating_point():
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                with pytest.raises(NotImplementedError, match="does not support forward-mode AD"):
                    operator(*arguments[:place], dual, *arguments[place + 1 :])
