"""linear_dpo_loss: packed pairs' hidden states and a head to DPO's sigmoid loss, with its gradient, frozen head."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.harness import (
    Benchmark,
    Candidate,
    LogProbs,
    Mode,
    Products,
    Work,
    eager_logprobs,
    ours,
    plain,
    takes,
    trl_logprobs,
)
from benchmarks.oracle import (
    GRADIENT,
    LOGPROB_BARS,
    PEER_NATS,
    Bar,
    Expected,
    Inputs,
    exact_logprobs,
    expected_loss,
    largest,
)
from benchmarks.shapes import LINEAR_DTYPES, LINEAR_FEW, Shape
from benchmarks.suite import linear

NAME = "linear_dpo_loss"
FROZEN = "frozen"
TENSORS = ("hidden", "weight", "targets", "sequence_ids", "ref_logps")
BETA = 0.1
RESPONSE = 256  # tokens of a response, on average
REFERENCE_STD = 5.0  # nats between a response's log-probability and its reference's


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Responses packed one behind the other, chosen first, of random lengths."""
    inputs = linear.make_inputs(shape, device, dtype, seed)
    generator = torch.Generator(device).manual_seed(seed + 1000)
    pairs = max(1, shape["N"] // (2 * RESPONSE))
    ids = torch.randint(2 * pairs, (shape["N"],), generator=generator, device=device).sort().values
    exact = torch.zeros(2 * pairs, dtype=torch.float64, device=device).index_add(0, ids, exact_logprobs(inputs))
    moved = exact + REFERENCE_STD * torch.randn(2 * pairs, generator=generator, device=device)
    # `exact` is for the oracle; no candidate gets it
    return {**inputs, "sequence_ids": ids, "ref_logps": moved.float(), "exact": exact, "one": torch.ones_like(moved[0])}


def work(shape: Shape, itemsize: int) -> Work:
    per_token = (
        8  # targets, int64
        + 8  # which response a token is of, int64
    )
    return linear.work(shape, itemsize, Products(1, 1), token_bytes=per_token)  # logits; dHidden


def expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    ratios = inputs["exact"] - inputs["ref_logps"].double()
    chosen, rejected = ratios.chunk(2)
    logits = BETA * (chosen - rejected)
    slope = -BETA * torch.sigmoid(-logits) / len(logits)  # dloss / d sum of a chosen response
    coefficients = torch.cat([slope, -slope])[inputs["sequence_ids"]]
    return expected_loss(inputs, wanted, -logsigmoid(logits).mean(), coefficients)


def from_logprobs(logprobs: LogProbs) -> Callable[..., tuple[Tensor, ...]]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
        tokens = logprobs(hidden, weight, targets)
        chosen, rejected = (torch.zeros_like(ref).index_add(0, ids, tokens) - ref).chunk(2)
        with torch.no_grad():  # what a trainer logs
            rewards = BETA * chosen.mean(), BETA * rejected.mean()
            margin, accuracy = BETA * (chosen - rejected).mean(), (chosen > rejected).float().mean()
        return -logsigmoid(BETA * (chosen - rejected)).mean(), *rewards, margin, accuracy

    return loss


BENCHMARK = Benchmark(
    name=NAME,
    about=f"packed pairs of about {RESPONSE} tokens a response to DPO's sigmoid loss and its metrics",
    modes={FROZEN: Mode(linear.FROZEN_ABOUT, ("loss",), work, {"dHidden": "hidden"}, seed="one")},
    shapes=LINEAR_FEW,
    dtypes=LINEAR_DTYPES,
    inputs=make_inputs,
    expected=expected,
    bars={
        # |dloss/dlogp| is at most beta / pairs for each token of a pair: all of their errors, one way
        "loss": Bar(largest, {d: 2 * RESPONSE * BETA * bar for d, bar in LOGPROB_BARS.items()}, PEER_NATS),
        "dHidden": GRADIENT,
    },
    candidates=(
        ours(NAME, lambda function: takes(lambda *tensors: function(*tensors, beta=BETA).loss, TENSORS)),
        *plain(from_logprobs(eager_logprobs), TENSORS),
        Candidate("TRL + formula", lambda device: takes(from_logprobs(trl_logprobs()), TENSORS)),
    ),
)
