"""Who is timed: ours, and every public way to get per-token log-probabilities from hidden states.

A candidate is a name and a loader. The loader returns `logprobs(hidden, weight, targets) -> [N]`, or raises
`Unavailable` with the reason, which then stands in the table. Imports happen in the loaders: a peer that is not
installed costs its row and nothing else.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.shapes import FORWARD, TRAINED, Inputs

LogProbs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OURS, EAGER = "onecard", "eager"


class Unavailable(Exception):
    """The candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    name: str
    load: Callable[[torch.device], LogProbs]
    slow_start: bool = False  # compiles for a while: left out of --quick


def imported(module: str) -> object:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken import of a peer is a reason for its row, not an end of the run
        raise Unavailable(one_line(error)) from error


def one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit]


def onecard(device: torch.device) -> LogProbs:
    module = imported("onecard_kernels")
    linear_logprobs = getattr(module, "linear_logprobs", None)
    if linear_logprobs is None:
        raise Unavailable("onecard_kernels has no linear_logprobs")
    return lambda hidden, weight, targets: linear_logprobs(hidden, weight, targets).logprobs


def eager_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What a trainer without a fused loss does. The softmax is in fp32, as careful trainers have it."""
    logits = hidden @ weight.t()
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)


def eager(device: torch.device) -> LogProbs:
    return eager_logprobs


def compiled(device: torch.device) -> LogProbs:
    torch._dynamo.reset()  # every case compiles anew: its shapes are constants, and no recompilation limit is met
    return torch.compile(eager_logprobs, fullgraph=True, dynamic=False)


def trl(device: torch.device) -> LogProbs:
    """TRL's call in `add_fused_lm_head`, argument for argument, with none of the optional outputs."""
    function = imported("trl.kernels").ChunkedLogProbFunction
    chunk = imported("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        bias, temperature, softcap, logit_scale = None, 1.0, None, 1.0
        return function.apply(hidden, weight, bias, targets, temperature, chunk, softcap, logit_scale, ("log_probs",))[
            0
        ]

    return logprobs


def liger(device: torch.device) -> LogProbs:
    """The log-probabilities inside Liger's fused PPO and GRPO losses."""
    base = imported("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase
    if not hasattr(base, "chunk_forward"):
        raise Unavailable("this Liger has no LigerFusedLinearPPOBase.chunk_forward")
    return lambda hidden, weight, targets: base.chunk_forward(hidden[None], weight, targets[None])[0]


def cut_cross_entropy(device: torch.device) -> LogProbs:
    """CCE with its defaults, which skip small gradients on purpose."""
    if device.type != "cuda":
        raise Unavailable("its kernels are Triton: a GPU is needed")
    loss = imported("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: -loss(hidden, weight, targets, reduction="none")


CANDIDATES: tuple[Candidate, ...] = (
    Candidate(OURS, onecard),
    Candidate(EAGER, eager),
    Candidate("torch.compile", compiled, slow_start=True),
    Candidate("TRL", trl),
    Candidate("Liger", liger),
    Candidate("cut-cross-entropy", cut_cross_entropy),
)


def run(logprobs: LogProbs, inputs: Inputs, mode: str) -> tuple[torch.Tensor, ...]:
    """One call in one mode: (logprobs,), with the gradient of the hidden states, and with that of the head."""
    if mode == FORWARD:
        with torch.no_grad():
            return (logprobs(inputs.hidden, inputs.weight, inputs.targets),)
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(mode == TRAINED)
    wanted = (hidden, weight) if mode == TRAINED else (hidden,)
    values = logprobs(hidden, weight, inputs.targets)
    gradients = torch.autograd.grad(values, wanted, inputs.grad.to(values.dtype))
    return (values.detach(), *gradients)


def works(logprobs: LogProbs, sets: list[Inputs], mode: str) -> list[Callable[[], object]]:
    return [functools.partial(run, logprobs, inputs, mode) for inputs in sets]
