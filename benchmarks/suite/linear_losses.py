"""linear_ppo_loss and linear_dpo_loss: hidden states and a head to a loss, with its gradient, frozen head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks import oracle
from benchmarks.harness import (
    Benchmark,
    Candidate,
    Function,
    LogProbs,
    Mode,
    Products,
    Work,
    attribute,
    eager_logprobs,
    ours,
    plain,
    takes,
    trl_logprobs,
)
from benchmarks.oracle import LOGPROB_BARS, Bar, Inputs
from benchmarks.shapes import LINEAR_DTYPES, LINEAR_FEW, LINEAR_LOSS, Shape, Shapes
from benchmarks.suite import linear_logprobs as linear
from benchmarks.suite.formulas import CLIP, clip_share_inputs, policy_loss, policy_oracle

FROZEN = "frozen"
BETA = 0.1
RESPONSE = 256  # tokens of a response, on average
REFERENCE_STD = 5.0  # nats between a response's log-probability and its reference's
HEAD = ("hidden", "weight", "targets")
PPO_TENSORS = (*HEAD, "old_logprobs", "advantages", "mask")
DPO_TENSORS = (*HEAD, "sequence_ids", "ref_logps")

Loss = Callable[..., tuple[Tensor, ...]]  # of log-probabilities and a batch's other tensors: the loss, then metrics


def benchmark(
    name: str,
    about: str,
    shapes: Mapping[str, Shapes],
    batch: Callable[[Inputs, int], Inputs],
    token_bytes: int,
    loss_oracle: Callable[[Tensor, Inputs], tuple[Tensor, Tensor]],
    loss: Loss,
    tensors: tuple[str, ...],
    bar: Mapping[torch.dtype, float],
    *peers: Candidate,
    **settings: Any,
) -> Benchmark:
    """A loss of log-probabilities. `batch`: the tensors besides hidden states, head and targets. `loss_oracle`: the
    loss and its derivative by each log-probability, in fp64.
    """

    def inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
        found = linear.make_inputs(shape, device, dtype, seed)
        found["exact"] = oracle.exact_logprobs(found)  # for the oracle; no candidate gets it
        return {**found, **batch(found, seed), "one": torch.ones((), device=device)}

    def work(shape: Shape, itemsize: int) -> Work:
        return linear.work(shape, itemsize, products=Products(1, 1), token_bytes=token_bytes)  # logits; dHidden

    def of(logprobs: LogProbs) -> Loss:
        return lambda hidden, weight, targets, *rest: loss(logprobs(hidden, weight, targets), *rest)

    return Benchmark(
        name=name,
        about=about,
        modes={FROZEN: Mode(linear.FROZEN_ABOUT, ("loss",), work, {"dHidden": "hidden"}, seed="one")},
        shapes=shapes,
        dtypes=LINEAR_DTYPES,
        inputs=inputs,
        expected=lambda given, wanted: oracle.expected_loss(given, wanted, *loss_oracle(given["exact"], given)),
        bars={"loss": Bar(oracle.largest, bar, oracle.PEER_NATS), "dHidden": oracle.GRADIENT},
        candidates=(
            ours(name, lambda function: takes(lambda *given: function(*given, **settings).loss, tensors)),
            *plain(of(eager_logprobs), tensors),
            Candidate("TRL + formula", lambda device: takes(of(trl_logprobs()), tensors)),
            *peers,
        ),
    )


# --- PPO


def liger(device: torch.device) -> Function:
    """GRPO's loss is PPO's when every token is a sequence of its own: its advantages are per sequence, ours per token.

    One chunk of all tokens; inside, Liger cuts tokens and vocabulary itself. "bnpo" divides by the number of tokens.
    """
    settings = {"beta": 0.0, "use_ref_model": False, "epsilon_low": CLIP, "epsilon_high": CLIP, "loss_type": "bnpo"}
    module = attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")

    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, a: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        fused = module(**settings, chunk_size=len(hidden))
        rows = mask[:, None].to(torch.float32)
        return fused(hidden[:, None], weight, targets[:, None], rows, a, old_per_token_logps=old[:, None])

    return takes(loss, PPO_TENSORS)


PPO = benchmark(
    "linear_ppo_loss",
    "hidden states and a head to PPO's clipped policy loss and its metrics; 15 % of the tokens are clipped",
    LINEAR_LOSS,
    lambda given, seed: clip_share_inputs(given["exact"], seed),
    # The second product of clipped tokens (15 %) could be left out: who does so may pass 100 % of the limit.
    (
        8  # targets, int64
        + 4  # old log-probabilities, fp32
        + 4  # advantages, fp32
        + 1  # mask
    ),
    policy_oracle,
    policy_loss,
    PPO_TENSORS,
    LOGPROB_BARS,  # |dloss/dlogp| sums to about one over all tokens, so the loss is as right as the log-probabilities
    Candidate("Liger", liger, slow_start=True),
)


# --- DPO


def pairs(given: Inputs, seed: int) -> Inputs:
    """Responses packed one behind the other, chosen first, of random lengths."""
    exact = given["exact"]
    generator = torch.Generator(exact.device).manual_seed(seed + 1000)
    count = 2 * max(1, len(exact) // (2 * RESPONSE))
    ids = torch.randint(count, exact.shape, generator=generator, device=exact.device).sort().values
    sums = torch.zeros(count, dtype=torch.float64, device=exact.device).index_add(0, ids, exact)
    moved = sums + REFERENCE_STD * torch.randn(count, generator=generator, device=exact.device)
    return {"sequence_ids": ids, "ref_logps": moved.float()}


def pairs_oracle(exact: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
    ids, ref = given["sequence_ids"], given["ref_logps"].double()
    chosen, rejected = (torch.zeros_like(ref).index_add(0, ids, exact) - ref).chunk(2)
    logits = BETA * (chosen - rejected)
    slope = -BETA * torch.sigmoid(-logits) / len(logits)  # dloss / d sum of a chosen response
    return -logsigmoid(logits).mean(), torch.cat([slope, -slope])[ids]


def dpo_loss(logprobs: Tensor, ids: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
    chosen, rejected = (torch.zeros_like(ref).index_add(0, ids, logprobs) - ref).chunk(2)
    with torch.no_grad():  # what a trainer logs
        rewards = BETA * chosen.mean(), BETA * rejected.mean()
        margin, accuracy = BETA * (chosen - rejected).mean(), (chosen > rejected).float().mean()
    return -logsigmoid(BETA * (chosen - rejected)).mean(), *rewards, margin, accuracy


DPO = benchmark(
    "linear_dpo_loss",
    f"packed pairs of about {RESPONSE} tokens a response to DPO's sigmoid loss and its metrics",
    LINEAR_FEW,
    pairs,
    (
        8  # targets, int64
        + 8  # which response a token is of, int64
    ),
    pairs_oracle,
    dpo_loss,
    DPO_TENSORS,
    # |dloss/dlogp| is at most beta / pairs for each token of a pair: all of their errors, one way
    {dtype: 2 * RESPONSE * BETA * bar for dtype, bar in LOGPROB_BARS.items()},
    beta=BETA,
)
