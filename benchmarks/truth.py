"""The errors of a candidate against fp64, and the verdict: what is wrong is not timed.

Truths are written out from the equations, derivatives too, and never by the code or the autograd that they judge.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.anatomy import Bar, Benchmark, Inputs, Outputs, Truth

ROWS = 64  # tokens, and rows of the head, that are compared
FP64_BYTES = 1 << 30  # of logits held at a time

# |logp - fp64| at a logit standard deviation of 4, by the inputs' dtype
LOGPROB_BARS = {torch.float32: 2e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# A gradient of ours may have twice the eager error of the same dtype; a peer's log-probability may be off by as much as
# several bf16 logits.
TIMES_EAGER, PEER_NATS = 2.0, 0.25

Errors = dict[str, float]


def largest(got: Tensor, true: Tensor) -> float:
    """The largest difference."""
    return float((got.double() - true).abs().max())


def relative(got: Tensor, true: Tensor) -> float:
    """The worst row's largest error, over the largest entry of that row's truth: small rows count as much as large.

    Rows whose truth is zero (clipped tokens) are held against the largest row.
    """
    error, size = (got.double() - true).abs().amax(-1), true.abs().amax(-1)
    size = torch.where(size == 0, size.max(), size)
    return float((error / size.clamp_min(torch.finfo(torch.float64).tiny)).max())


def overall(got: Tensor, true: Tensor) -> float:
    """The largest error, over the largest entry of all rows.

    For the gradient of the KL: that of a token near its minimum is a small difference of large numbers, so its own size
    says nothing about what rounding may do to it.
    """
    return float((got.double() - true).abs().max() / true.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


NATS = Bar(largest, LOGPROB_BARS, PEER_NATS)
GRADIENT = Bar(relative)


def errors_of(outputs: Outputs, true: Mapping[str, Truth], bars: Mapping[str, Bar]) -> Errors:
    found = {}
    for name, value in outputs.items():
        truth = true[name]
        found[name] = bars[name].error(value if truth.at is None else value[truth.at], truth.value)
    return found


def objections(benchmark: Benchmark, errors: Errors, eager: Errors | None, dtype: torch.dtype) -> list[str]:
    """Why ours is wrong; empty when it is right. NaN is never within a bar."""
    allowed = {name: bar_of(benchmark, name, eager, dtype) for name in errors}
    return [
        f"{name}: error {value:.2g} against fp64, bar {allowed[name]:.2g}"
        for name, value in errors.items()
        if not value <= allowed[name]
    ]


def bar_of(benchmark: Benchmark, name: str, eager: Errors | None, dtype: torch.dtype) -> float:
    """How large ours' error of one result may be."""
    floor = 4 * torch.finfo(dtype).eps  # a few roundings of the result are nobody's fault
    fixed = benchmark.bars[name].ours
    if fixed is not None:
        return fixed[dtype]
    # Where eager did not run (out of memory): a looser fixed bar
    return 17 * floor if eager is None else floor + TIMES_EAGER * eager[name]


def peer_objection(benchmark: Benchmark, errors: Errors) -> str | None:
    for name, value in errors.items():
        if not math.isfinite(value) or value > benchmark.bars[name].peer:
            return f"wrong here ({name} off by {value:.2g}): not timed"
    return None


def sample(count: int, device: torch.device) -> Tensor:
    """A few rows, spread over all of them, the first and the last among them."""
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
        at_target = logits.gather(-1, targets[part, None]).squeeze(-1)
        found[part] = at_target - logits.logsumexp(-1)
    return found


def directions(inputs: Inputs, rows: Tensor) -> Tensor:
    """dlogp/dh of a few tokens: W[y] - sum_v p_v W_v."""
    weight = inputs["weight"].double()
    p = (inputs["hidden"][rows].double() @ weight.t()).softmax(-1)
    return weight[inputs["targets"][rows]] - p @ weight


def head_gradient(inputs: Inputs, coefficients: Tensor) -> Truth:
    """Some rows of dL/dW, to which every token adds; `coefficients` is dL/dlogp [N]."""
    hidden, targets, rows = inputs["hidden"], inputs["targets"], sample(len(inputs["targets"]), coefficients.device)
    edge = torch.tensor([0, inputs["weight"].shape[0] - 1], device=hidden.device)  # where a bad block edge would show
    vocab = torch.cat([edge, targets[rows]]).unique()
    total = torch.zeros(len(vocab), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for part, logits in logits_in_parts(hidden, inputs["weight"]):
        slope = -(logits[:, vocab] - logits.logsumexp(-1, keepdim=True)).exp()
        slope += targets[part, None] == vocab
        total += (slope * coefficients[part, None].double()).t() @ hidden[part].double()
    return Truth(total, vocab)


def loss_truth(inputs: Inputs, wanted: Collection[str], loss: Tensor, coefficients: Tensor) -> dict[str, Truth]:
    """Of a loss of log-probabilities: its value, and the gradient of a few hidden states, from dL/dlogp [N]."""
    found = {"loss": Truth(loss)}
    if "dHidden" in wanted:
        rows = sample(len(coefficients), coefficients.device)
        found["dHidden"] = Truth(directions(inputs, rows) * coefficients[rows, None].double(), rows)
    return found
