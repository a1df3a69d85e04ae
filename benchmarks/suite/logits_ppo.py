"""logits_ppo_loss as a benchmark of tuning: logits to PPO's clipped policy loss, and its gradient."""

from __future__ import annotations

from collections.abc import Collection

import torch

from benchmarks.harness import Benchmark, Mode, Work, ours, plain, takes
from benchmarks.oracle import GRADIENT, LOGPROB_BARS, PEER_NATS, Bar, Expected, Inputs, largest, sample
from benchmarks.shapes import LINEAR_DTYPES, LOGITS, Shape
from benchmarks.suite import selective
from benchmarks.suite.formulas import clip_share_inputs, policy_loss, policy_oracle

NAME, BACKWARD = "logits_ppo_loss", "backward"
TENSORS = ("logits", "targets", "old_logprobs", "advantages", "mask")


def exact_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """fp64 log-probabilities of all targets, a few rows at a time."""
    found = torch.empty(targets.shape, dtype=torch.float64, device=logits.device)
    for rows in torch.arange(len(targets), device=logits.device).split(256):
        wide = logits[rows].double()
        found[rows] = wide.gather(-1, targets[rows, None]).squeeze(-1) - wide.logsumexp(-1)
    return found


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    inputs = selective.make_inputs(shape, device, dtype, seed)
    inputs["exact"] = exact_logprobs(inputs["logits"], inputs["targets"])  # for the oracle; no candidate gets it
    return {**inputs, **clip_share_inputs(inputs["exact"], seed), "one": torch.ones((), device=device)}


def work(shape: Shape, itemsize: int) -> Work:
    n, v = shape["N"], shape["V"]
    return Work(
        n * v * itemsize  # read the logits
        + n * (8 + 4 + 4 + 1)  # targets, old log-probabilities, advantages, mask
        + n * v * itemsize  # read the logits again
        + n * v * itemsize  # write their gradient
    )


def expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    loss, coefficients = policy_oracle(inputs["exact"], inputs)
    rows = sample(len(coefficients), coefficients.device)
    targets = inputs["targets"][rows, None]
    slope = -inputs["logits"][rows].double().softmax(-1)
    slope.scatter_add_(-1, targets, torch.ones_like(targets, dtype=slope.dtype))
    return {"loss": Expected(loss), "dLogits": Expected(slope * coefficients[rows, None].double(), rows)}


def eager(logits: torch.Tensor, targets: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logp = torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)
    return policy_loss(logp, *rest)


BENCHMARK = Benchmark(
    name=NAME,
    about="logits to PPO's clipped policy loss and its metrics; 15 % of the tokens are clipped",
    modes={BACKWARD: Mode("forward + backward", ("loss",), work, {"dLogits": "logits"}, seed="one")},
    shapes=LOGITS,
    dtypes=LINEAR_DTYPES,
    inputs=make_inputs,
    expected=expected,
    bars={"loss": Bar(largest, LOGPROB_BARS, PEER_NATS), "dLogits": GRADIENT},
    candidates=(
        ours(NAME, lambda function: takes(lambda *tensors: function(*tensors).loss, TENSORS)),
        plain(eager, TENSORS)[0],
    ),
)
