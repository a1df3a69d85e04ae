"""linear_ppo_loss: hidden states and a head to PPO's clipped policy loss, with its gradient, frozen head."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

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
from benchmarks.shapes import LINEAR_DTYPES, LINEAR_LOSS, Shape
from benchmarks.suite import linear
from benchmarks.suite.formulas import CLIP, clip_share_inputs, policy_loss, policy_oracle

NAME = "linear_ppo_loss"
FROZEN = "frozen"
TENSORS = ("hidden", "weight", "targets", "old_logprobs", "advantages", "mask")


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Tokens of which 15 % are clipped, clearly: no candidate's rounding decides which."""
    inputs = linear.make_inputs(shape, device, dtype, seed)
    inputs["exact"] = exact_logprobs(inputs)  # for the oracle; no candidate gets it
    return {**inputs, **clip_share_inputs(inputs["exact"], seed), "one": torch.ones((), device=device)}


def work(shape: Shape, itemsize: int) -> Work:
    per_token = (
        8  # targets, int64
        + 4  # old log-probabilities, fp32
        + 4  # advantages, fp32
        + 1  # mask
    )
    # logits; dHidden. The second product of clipped tokens (15 %) could be left out: who does so may pass 100 %.
    return linear.work(shape, itemsize, Products(1, 1), token_bytes=per_token)


def expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    loss, coefficients = policy_oracle(inputs["exact"], inputs)
    return expected_loss(inputs, wanted, loss, coefficients)


def from_logprobs(logprobs: LogProbs) -> Callable[..., tuple[Tensor, ...]]:
    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, a: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        return policy_loss(logprobs(hidden, weight, targets), old, a, mask)

    return loss


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

    return takes(loss, TENSORS)


BENCHMARK = Benchmark(
    name=NAME,
    about="hidden states and a head to PPO's clipped policy loss and its metrics; 15 % of the tokens are clipped",
    modes={FROZEN: Mode(linear.FROZEN_ABOUT, ("loss",), work, {"dHidden": "hidden"}, seed="one")},
    shapes=LINEAR_LOSS,
    dtypes=LINEAR_DTYPES,
    inputs=make_inputs,
    expected=expected,
    # |dloss/dlogp| sums to about one over all tokens, so the loss is as right as the log-probabilities
    bars={"loss": Bar(largest, LOGPROB_BARS, PEER_NATS), "dHidden": GRADIENT},
    candidates=(
        ours(NAME, lambda function: takes(lambda *tensors: function(*tensors).loss, TENSORS)),
        *plain(from_logprobs(eager_logprobs), TENSORS),
        Candidate("TRL + formula", lambda device: takes(from_logprobs(trl_logprobs()), TENSORS)),
        Candidate("Liger", liger, slow_start=True),
    ),
)
