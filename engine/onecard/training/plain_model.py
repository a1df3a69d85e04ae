"""Texts to compare a model's passes on, and the log-probs that are right: the plain model's.

The plain model runs one text a pass, in evaluation mode, with the attention that transformers chose for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.data.batches import TokenBatch, TokenSequence, pack, to_device
from onecard.models.attention import plain_attention
from onecard.models.roles import Roles
from onecard.models.trunk import context_of, evaluating, trunk_of
from onecard.models.vocabulary import known_tokens

# Tokens: of short texts, of the beginning that two of them share, behind texts to see rounding, of the least probe
SHORT, SHARED, TAIL, LEAST = 24, 12, 7, 8
LIMIT = 1e-3  # nat: of any token in float32
LIMIT_16_BIT = 0.05  # nat: the mean over a text in 16 bit, beside three times the plain model's own rounding
ROUNDING_16_BIT = 0.1  # nat: the mean over a text by rounding, above which nothing can be told


def text(vocabulary: int, length: int, variant: int) -> tuple[int, ...]:
    """Tokens spread over the vocabulary; each `variant` gives another text."""
    return tuple((7919 * index + 104729 * variant + 13) % vocabulary for index in range(length))


def scored(tokens: tuple[int, ...], prompt: int = 1) -> TokenSequence:
    """A text of which every token after the first `prompt` is scored."""
    return TokenSequence(tokens, (False,) * prompt + (True,) * (len(tokens) - prompt))


def probe(roles: Roles, longest: int, row: int = 0) -> list[TokenSequence]:
    """A short text, one of `longest` tokens, and a short one that begins as the first does; together at most `row`
    tokens, if that is given.
    """
    short = min(SHORT, longest, max(row // 3, 2) if row else SHORT)
    middle = min(longest, max(row - 2 * short, 2) if row else longest)
    first, long, last = (
        text(known_tokens(roles.causal_model()), n, place) for place, n in enumerate((short, middle, short))
    )
    shared = min(SHARED, short - 1)
    return [scored(first), scored(long), scored(first[:shared] + last[shared:], shared)]


def logprobs(roles: Roles, batch: TokenBatch, layout: str) -> list[Tensor]:
    """Log-probs of each text under the current role, in a layout."""
    before = roles.layout
    roles.layout = layout
    try:
        found = roles.logprobs(batch, batch.targets)
    finally:
        roles.layout = before
    return list(found.split(list(batch.num_targets)))


def is_16_bit(roles: Roles) -> bool:
    return roles.causal_model().dtype in (torch.bfloat16, torch.float16)


def distance(found: Tensor, truth: Tensor) -> float:
    """Mean difference over a text in nats, without the eighth of its tokens that differ most: by rounding alone, a
    router may choose other experts for a few.
    """
    off = (found - truth).abs().nan_to_num(nan=torch.inf).sort().values
    return float(off[: max(1, len(off) - len(off) // 8)].mean())


@dataclass(frozen=True)
class PlainLogprobs:
    """Log-probs of texts by the plain model, and how far rounding alone moves them (None: float32)."""

    logprobs: list[Tensor]
    rounding: float | None

    def difference(self, found: Sequence[Tensor]) -> str:
        """How far log-probs are off, in words; empty if within rounding."""
        pairs = list(zip(found, self.logprobs, strict=True))
        if self.rounding is None:
            largest = max(float((one - other).abs().nan_to_num(nan=torch.inf).max()) for one, other in pairs)
            return "" if largest <= LIMIT else f"off by up to {largest:.3g} nat"
        if self.rounding > ROUNDING_16_BIT:
            return f"not to be told apart where rounding alone makes {self.rounding:.3g} nat a token"
        mean = max(distance(one, other) for one, other in pairs)
        return "" if mean <= LIMIT_16_BIT + 3 * self.rounding else f"off by {mean:.3g} nat a token"


def plain_logprobs(roles: Roles, texts: Sequence[TokenSequence]) -> PlainLogprobs:
    """The plain model's log-probs of each text. In 16 bit also of longer ones, whose first tokens a tail cannot change
    but by rounding: matrix products of another shape add up in another order.
    """
    model = roles.causal_model()
    context = context_of(trunk_of(model).config) or math.inf

    def computed(each: TokenSequence) -> Tensor:
        return logprobs(roles, to_device(pack([each]), roles.device), "single")[0]

    with evaluating(model), plain_attention(model):
        truth = [computed(each) for each in texts]
        if not is_16_bit(roles):
            return PlainLogprobs(truth, None)
        moved = [
            distance(
                computed(scored(each.tokens + each.tokens[:TAIL], each.response_mask.index(True)))[: len(own)], own
            )
            for each, own in zip(texts, truth, strict=True)
            if len(each) + TAIL <= context
        ]
    return PlainLogprobs(truth, max(moved, default=0.0))
