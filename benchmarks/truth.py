"""The fp64 truth, the errors of a candidate against it, and the verdict: what is wrong is not timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.shapes import TRAINED, Inputs

ROWS = 64  # tokens, and rows of the head, that are compared
FP64_BYTES = 1 << 30  # of logits held at a time

# |logp - fp64| at a logit standard deviation of 4
BARS = {torch.float32: 2e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# A gradient of ours may have twice the eager error of the same dtype; a peer's log-probability may be off by as much as
# several bf16 logits. Beyond that the peer is broken here, or called wrongly by us: no time either way.
TIMES_EAGER, PEER_BAR = 2.0, 0.25


@dataclass(frozen=True)
class Truth:
    """fp64, from the very inputs the candidates get (bf16 inputs are exact in fp64)."""

    rows: torch.Tensor  # tokens compared
    logprobs: torch.Tensor
    hidden: torch.Tensor  # gradient
    vocab: torch.Tensor  # rows of the head compared
    weight: torch.Tensor | None  # gradient, where the mode asks for it


@dataclass(frozen=True)
class Errors:
    logprobs: float  # nats, the largest
    hidden: float | None = None  # the worst row's largest error over that row's largest entry
    weight: float | None = None


def truth_of(inputs: Inputs, mode: str) -> Truth:
    tokens, device = inputs.hidden.shape[0], inputs.hidden.device
    rows = torch.linspace(0, tokens - 1, min(ROWS, tokens), device=device).long()
    weight, grad = inputs.weight.double(), inputs.grad.double()
    logp, row_hidden = _rows(inputs.hidden[rows].double(), weight, inputs.targets[rows], grad[rows])
    edge = torch.tensor([0, inputs.weight.shape[0] - 1], device=device)  # where a bad block edge would show
    vocab = torch.cat([edge, inputs.targets[rows]]).unique()
    if mode != TRAINED:
        return Truth(rows, logp, row_hidden, vocab, None)
    total = torch.zeros(len(vocab), inputs.hidden.shape[1], dtype=torch.float64, device=device)
    chunk = max(1, FP64_BYTES // (8 * inputs.weight.shape[0]))
    for part in torch.arange(tokens, device=device).split(chunk):  # every token adds to every row of the head
        hidden = inputs.hidden[part].double()
        logits = hidden @ weight.t()
        slope = -(logits[:, vocab] - logits.logsumexp(-1, keepdim=True)).exp()
        slope += inputs.targets[part, None] == vocab
        total += (slope * grad[part, None]).t() @ hidden
    return Truth(rows, logp, row_hidden, vocab, total)


def _rows(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and grad * (W[y] - sum_v p_v W_v), for a few tokens."""
    logits = hidden @ weight.t()
    logprobs = logits.log_softmax(-1)
    direction = weight[targets] - logprobs.exp() @ weight
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), direction * grad[:, None]


def errors_of(outputs: tuple[torch.Tensor, ...], truth: Truth) -> Errors:
    logprobs = float((outputs[0][truth.rows].double() - truth.logprobs).abs().max())
    hidden = relative(outputs[1][truth.rows], truth.hidden) if len(outputs) > 1 else None
    weight = relative(outputs[2][truth.vocab], truth.weight) if len(outputs) > 2 and truth.weight is not None else None
    return Errors(logprobs, hidden, weight)


def relative(got: torch.Tensor, true: torch.Tensor) -> float:
    """The worst row's largest error, over the largest entry of that row's truth: small rows count as much as large."""
    error, size = (got.double() - true).abs().amax(-1), true.abs().amax(-1)
    return float((error / size.clamp_min(torch.finfo(torch.float64).tiny)).max())


def objections(errors: Errors, eager: Errors | None, dtype: torch.dtype) -> list[str]:
    """Why ours is wrong; empty when it is right. NaN is never within a bar."""
    bars = {"logprobs": BARS[dtype]}
    # A few roundings of the result are nobody's fault. Where eager did not run (out of memory), a looser fixed bar.
    floor = 4 * torch.finfo(dtype).eps
    for name in ("hidden", "weight"):
        of_eager = getattr(eager, name) if eager is not None else None
        bars[name] = floor + (TIMES_EAGER * of_eager if of_eager is not None else 16 * floor)
    found = []
    for name, bar in bars.items():
        value = getattr(errors, name)
        if value is not None and not value <= bar:
            what = "logprobs" if name == "logprobs" else f"gradient of {name}"
            found.append(f"{what}: error {value:.2g} against fp64, bar {bar:.2g}")
    return found


def peer_objection(errors: Errors) -> str | None:
    if errors.logprobs <= PEER_BAR and not any(
        value is not None and not math.isfinite(value) for value in (errors.hidden, errors.weight)
    ):
        return None
    return f"wrong here (log-probability off by {errors.logprobs:.2g} nats): not timed"
