"""fp64 oracles, written out from the equations with their derivatives, and the largest errors that pass.

An oracle shares no code and no autograd with the function that it checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Errors = dict[str, float]

ROWS = 64  # tokens, and rows of the head, that are compared
FP64_BYTES = 1 << 30  # of logits held at a time
# |logp - fp64| in nats at a logit standard deviation of 4, by the inputs' dtype
LOGPROB_BARS = {torch.float32: 2e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# A gradient of ours may have twice the eager error of the same dtype. A peer's log-probability may be off by as much as
# several bf16 logits.
TIMES_EAGER, PEER_NATS = 2.0, 0.25


@dataclass(frozen=True)
class Expected:
    """An output in fp64, from the candidates' own inputs (bf16 inputs are exact in fp64)."""

    value: Tensor
    at: Tensor | None = None  # rows of the output that are compared; None: all


@dataclass(frozen=True)
class Bar:
    """How the error of an output is taken, and how large it may be."""

    error: Callable[[Tensor, Tensor], float]
    ours: Mapping[torch.dtype, float] | None = None  # by the inputs' dtype; None: twice eager's error in this case
    peer: float = math.inf  # a peer beyond it is broken here, or called wrongly: it is not timed

    def of_ours(self, eager: float | None, dtype: torch.dtype) -> float:
        if self.ours is not None:
            return self.ours[dtype]
        floor = 4 * torch.finfo(dtype).eps  # a few roundings of the result
        # Where eager did not run (out of memory): a looser fixed bar
        return 17 * floor if eager is None else floor + TIMES_EAGER * eager


def largest(got: Tensor, true: Tensor) -> float:
    """The largest difference."""
    return float((got.double() - true).abs().max())


def relative(got: Tensor, true: Tensor) -> float:
    """The worst row's largest error, over the largest entry of that row.

    Rows that should be zero (clipped tokens) are held against the largest row.
    """
    error, size = (got.double() - true).abs().amax(-1), true.abs().amax(-1)
    size = torch.where(size == 0, size.max(), size)
    return float((error / size.clamp_min(torch.finfo(torch.float64).tiny)).max())


def overall(got: Tensor, true: Tensor) -> float:
    """The largest error, over the largest entry of all rows.

    For the gradient of the KL: near its minimum a token's gradient is a small difference of large numbers.
    """
    return float((got.double() - true).abs().max() / true.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


NATS = Bar(largest, LOGPROB_BARS, PEER_NATS)
GRADIENT = Bar(relative)


def sample(count: int, device: torch.device) -> Tensor:
    """Rows spread over all of them, the first and the last among them."""
    return torch.linspace(0, count - 1, min(ROWS, count), device=device).long()


def logits_in_parts(hidden: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(token indices, their fp64 logits), a bounded part at a time."""
    wide = weight.double()
    chunk = max(1, FP64_BYTES // (8 * weight.shape[0]))
    for part in torch.arange(hidden.shape[0], device=hidden.device).split(chunk):
        yield part, hidden[part].double() @ wide.t()


def exact_logprobs(inputs: Inputs) -> Tensor:
    """fp64 log-probabilities of all targets."""
    targets = inputs["targets"]
    found = torch.empty(targets.shape, dtype=torch.float64, device=targets.device)
    for part, logits in logits_in_parts(inputs["hidden"], inputs["weight"]):
        found[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - logits.logsumexp(-1)
    return found


def directions(inputs: Inputs, rows: Tensor) -> Tensor:
    """dlogp/dh of a few tokens: W[y] - sum_v p_v W_v."""
    weight = inputs["weight"].double()
    p = (inputs["hidden"][rows].double() @ weight.t()).softmax(-1)
    return weight[inputs["targets"][rows]] - p @ weight


def head_gradient(inputs: Inputs, coefficients: Tensor) -> Expected:
    """Some rows of dL/dW, to which every token adds; `coefficients` is dL/dlogp [N]."""
    hidden, targets, rows = inputs["hidden"], inputs["targets"], sample(len(inputs["targets"]), coefficients.device)
    edge = torch.tensor([0, inputs["weight"].shape[0] - 1], device=hidden.device)  # where a bad block edge would show
    vocab = torch.cat([edge, targets[rows]]).unique()
    total = torch.zeros(len(vocab), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for part, logits in logits_in_parts(hidden, inputs["weight"]):
        slope = -(logits[:, vocab] - logits.logsumexp(-1, keepdim=True)).exp()
        slope += targets[part, None] == vocab
        total += (slope * coefficients[part, None].double()).t() @ hidden[part].double()
    return Expected(total, vocab)


def expected_loss(inputs: Inputs, wanted: Collection[str], loss: Tensor, coefficients: Tensor) -> dict[str, Expected]:
    """Of a loss of log-probabilities: its value, and the gradient of a few hidden states, from dL/dlogp [N]."""
    found = {"loss": Expected(loss)}
    if "dHidden" in wanted:
        rows = sample(len(coefficients), coefficients.device)
        found["dHidden"] = Expected(directions(inputs, rows) * coefficients[rows, None].double(), rows)
    return found
