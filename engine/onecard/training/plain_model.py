"""Reference log-probs for the startup checks, computed by the plain model, and the texts that they are computed on.

The plain model runs one text per forward pass, in evaluation mode, with transformers' attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.data.batches import TokenBatch, TokenSequence, pack, to_device
from onecard.models.attention import transformers_attention
from onecard.models.roles import Roles
from onecard.models.trunk import context_of, evaluating, trunk_of
from onecard.models.vocabulary import known_tokens

SHORT_LENGTH = 24  # tokens of a short text
SHARED_LENGTH = 12  # tokens of the prefix that two short texts share
TAIL_LENGTH = 7  # tokens that are appended to a text to measure rounding
MIN_LENGTH = 8  # tokens of the longest text: below it, an out-of-memory error ends the check
LIMIT = 1e-3  # nat: largest difference of a token in float32
LIMIT_16_BIT = 0.05  # nat: mean difference over a text in 16 bit, plus three times the plain model's own rounding
ROUNDING_16_BIT = 0.1  # nat: mean rounding over a text in 16 bit, above which log-probs cannot be compared


def made_up_tokens(vocabulary: int, length: int, variant: int) -> tuple[int, ...]:
    """Token ids of a made-up text, spread over the vocabulary. Each `variant` gives a different text."""
    return tuple((7919 * index + 104729 * variant + 13) % vocabulary for index in range(length))


def scored_sequence(tokens: tuple[int, ...], prompt: int = 1) -> TokenSequence:
    """A text with a response mask on every token after the first `prompt` tokens."""
    return TokenSequence(tokens, (False,) * prompt + (True,) * (len(tokens) - prompt))


def probe_sequences(roles: Roles, longest: int, row_length: int = 0) -> list[TokenSequence]:
    """A short text, one of `longest` tokens, and a short one that begins with the same tokens as the first.

    Together they have at most `row_length` tokens, unless it is 0.
    """
    short = min(SHORT_LENGTH, longest, max(row_length // 3, 2) if row_length else SHORT_LENGTH)
    middle = min(longest, max(row_length - 2 * short, 2) if row_length else longest)
    first, long, last = (
        made_up_tokens(known_tokens(roles.causal_model()), n, variant)
        for variant, n in enumerate((short, middle, short))
    )
    shared = min(SHARED_LENGTH, short - 1)
    return [scored_sequence(first), scored_sequence(long), scored_sequence(first[:shared] + last[shared:], shared)]


def logprobs(roles: Roles, batch: TokenBatch, layout: str) -> list[Tensor]:
    """Log-probs of each text under the current role, in a layout."""
    before = roles.layout
    roles.layout = layout
    try:
        all_logprobs = roles.logprobs(batch, batch.targets)
    finally:
        roles.layout = before
    return list(all_logprobs.split(list(batch.num_targets)))


def is_16_bit(roles: Roles) -> bool:
    return roles.causal_model().dtype in (torch.bfloat16, torch.float16)


def trimmed_mean_difference(logprobs: Tensor, expected: Tensor) -> float:
    """Mean absolute difference in nats, without the eighth of the tokens that differ most.

    Rounding can make a router choose other experts for a few tokens, whose log-probs then differ a lot.
    """
    differences = (logprobs - expected).abs().nan_to_num(nan=torch.inf).sort().values
    return float(differences[: max(1, len(differences) - len(differences) // 8)].mean())


@dataclass(frozen=True)
class PlainLogprobs:
    """The plain model's log-probs of texts, and their mean error from rounding in 16 bit (None: float32)."""

    logprobs: list[Tensor]
    rounding: float | None

    def fault(self, logprobs: Sequence[Tensor]) -> str:
        """The end of a message "log-probs ... are" about these log-probs' error; empty if it is within rounding."""
        pairs = list(zip(logprobs, self.logprobs, strict=True))
        if self.rounding is None:
            largest = max(float((one - other).abs().nan_to_num(nan=torch.inf).max()) for one, other in pairs)
            return "" if largest <= LIMIT else f"off by up to {largest:.3g} nat"
        if self.rounding > ROUNDING_16_BIT:
            return f"not comparable, because rounding alone changes them by {self.rounding:.3g} nat a token"
        mean = max(trimmed_mean_difference(one, other) for one, other in pairs)
        return "" if mean <= LIMIT_16_BIT + 3 * self.rounding else f"off by {mean:.3g} nat a token"


def plain_logprobs(roles: Roles, texts: Sequence[TokenSequence]) -> PlainLogprobs:
    """The plain model's log-probs of each text, and in 16 bit their rounding.

    Rounding is measured by appending tokens to a text. In a causal model, earlier log-probs then change only by
    rounding: the matrix products have another shape and are summed in another order.
    """
    model = roles.causal_model()
    context = context_of(trunk_of(model).config) or math.inf

    def computed(sequence: TokenSequence) -> Tensor:
        return logprobs(roles, to_device(pack([sequence]), roles.device), "single")[0]

    def with_tail(sequence: TokenSequence) -> TokenSequence:
        tokens = sequence.tokens + sequence.tokens[:TAIL_LENGTH]
        return scored_sequence(tokens, sequence.response_mask.index(True))

    with evaluating(model), transformers_attention(model):
        expected = [computed(each) for each in texts]
        if not is_16_bit(roles):
            return PlainLogprobs(expected, None)
        rounding = [
            trimmed_mean_difference(computed(with_tail(each))[: len(own)], own)
            for each, own in zip(texts, expected, strict=True)
            if len(each) + TAIL_LENGTH <= context
        ]
    return PlainLogprobs(expected, max(rounding, default=0.0))
