"""Who is timed: loaders that several benchmarks share, of ours and of every public way to the same result.

A loader returns the function, or raises `Unavailable` with the reason, which then stands in the table. Imports happen
in the loaders: a peer that is not installed costs its row and nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.anatomy import EAGER, OURS, Candidate, Function, Inputs, Unavailable

COMPILE = "torch.compile"
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], targets [N] -> [N]


def imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken import of a peer is a reason for its row, not an end of the run
        raise Unavailable(one_line(error)) from error


def attribute(module: str, name: str) -> Any:
    found = getattr(imported(module), name, None)
    if found is None:
        raise Unavailable(f"{module} has no {name}")
    return found


def one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit]


def takes(function: Callable[..., Any], names: Sequence[str], count: int = 1) -> Function:
    """`function` of tensors as one of inputs; the first `count` of what it returns are the outputs."""

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        result = function(*(inputs[name] for name in names))
        return (result,) if isinstance(result, Tensor) else tuple(result[:count])

    return call


def ours(name: str, call: Callable[[Callable[..., Any]], Function]) -> Candidate:
    """The public function `name` with its defaults; `call` says how it is called."""
    return Candidate(OURS, lambda device: call(attribute("onecard_kernels", name)), role="ours")


def our_variant(
    label: str,
    implementation: str,
    name: str,
    call: Callable[[Callable[..., Any]], Function],
    *,
    modes: tuple[str, ...] | None = None,
    devices: tuple[str, ...] | None = None,
) -> Candidate:
    """The same with the linear path told to use another implementation than the device's default."""

    def load(device: torch.device) -> Function:
        plans = imported("onecard_kernels.logprob.tuning")
        choice = plans.TABLE.get(device.type)
        if choice is not None and choice.default == implementation:
            raise Unavailable(f"the default on this device: see {OURS}")
        return call(attribute("onecard_kernels", name))

    def around() -> AbstractContextManager[object]:
        try:
            plans = imported("onecard_kernels.logprob.tuning")
        except Unavailable:
            return nullcontext()  # the loader says so
        return plans.override(implementation=implementation)

    return Candidate(f"{OURS}, {label}", load, role="ours", modes=modes, devices=devices, around=around)


def plain(function: Callable[..., Any], names: Sequence[str], count: int = 1) -> tuple[Candidate, Candidate]:
    """A formula in eager PyTorch, and the same lines compiled for the exact shape.

    What it returns after the outputs (metrics) is dropped outside, so that the compiler cannot leave it out.
    """

    def compiled(device: torch.device) -> Function:
        torch._dynamo.reset()  # every case compiles anew: its shapes are constants, and no recompilation limit is met
        return takes(torch.compile(function, fullgraph=True, dynamic=False), names, count)

    return (
        Candidate(EAGER, lambda device: takes(function, names, count)),
        Candidate(COMPILE, compiled, slow_start=True),
    )


def absent(name: str, reason: str) -> Candidate:
    """A peer that one would look for, with the reason why it is not timed."""

    def load(device: torch.device) -> Function:
        raise Unavailable(reason)

    return Candidate(name, load)


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a trainer without a fused loss does. The softmax is in fp32, as careful trainers have it."""
    logits = hidden @ weight.t()
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)


def trl_logprobs() -> LogProbs:
    """TRL's call in `add_fused_lm_head`, argument for argument, with none of the optional outputs."""
    function = attribute("trl.kernels", "ChunkedLogProbFunction")
    chunk = attribute("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        bias, temperature, softcap, logit_scale = None, 1.0, None, 1.0
        outputs = ("log_probs",)
        return function.apply(hidden, weight, bias, targets, temperature, chunk, softcap, logit_scale, outputs)[0]

    return logprobs


def liger_logprobs() -> LogProbs:
    """The log-probabilities inside Liger's fused PPO and GRPO losses."""
    base = attribute("liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase")
    if not hasattr(base, "chunk_forward"):
        raise Unavailable("this Liger has no LigerFusedLinearPPOBase.chunk_forward")
    return lambda hidden, weight, targets: base.chunk_forward(hidden[None], weight, targets[None])[0]
