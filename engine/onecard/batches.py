"""The records that flow through training, and the one place that pairs a hidden state with the token it predicts.

Everything is flat: sequences lie end to end with no padding, and `cu_seqlens` says where each begins. Padding is a
layout that `models/layout.py` makes at the model's door for those who ask for it; no record holds a pad token.

A worked example, two sequences `[7 8 | 9 2]` and `[7 | 5 2]` (prompt | response):

    tokens         7  8  9  2  7  5  2
    positions      0  1  2  3  0  1  2
    cu_seqlens     0           4        7
    response_mask  .  .  x  x  .  x  x

`response_targets` of it: row t is a place whose hidden state predicts `targets`, so it is one before the token.

    rows           1  2  4  5
    targets        9  2  5  2
    sequence_ids   0  0  1  1

In PPO the same two answers are episodes, sampled by the policy; their per-token records have one entry for each of the
r = 4 rows above, in that order: what `ExperienceBatch.old_logprobs`, `old_values`, `advantages` and `returns` hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class TokenSequence:
    """One tokenized text. `response_mask[t]` is True where token t is to be learned or scored."""

    tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; `margin` is by how much the chosen one is better, in reward units, where known.

    `ref_logps`: both answers' summed log-probs under the reference (nats), where they were computed beforehand.
    """

    chosen: TokenSequence
    rejected: TokenSequence
    margin: float = 0.0
    ref_logps: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class ScoredSequence:
    """One answer and the score that somebody gave it."""

    sequence: TokenSequence
    score: float

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class Ranking:
    """Two or more answers to one prompt, the best first."""

    sequences: tuple[TokenSequence, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class LabelledSequence:
    """One answer, and whether it is a desirable one.

    `mismatched` is the same prompt with the answer to another one: KTO measures its distance to the reference on it.
    It is empty where the loss does not ask for it.
    `ref_logps`: summed log-probs (nats) of `sequence` and `mismatched` under the reference, where already computed.
    """

    sequence: TokenSequence
    desirable: bool
    mismatched: TokenSequence
    ref_logps: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.sequence) + len(self.mismatched)


@dataclass(frozen=True)
class TokenBatch:
    """Sequences end to end. `tokens`, `positions` int64 [n]; `cu_seqlens` int32 [S + 1]; `response_mask` bool [n]."""

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...]  # of each sequence: plain integers, so that no step waits for the device to learn a shape

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class PreferenceBatch:
    """B pairs as 2B sequences: the chosen ones first (0..B-1), the rejected ones after (B..2B-1). `margins` fp32 [B].

    Pairs (a+, a-) and (b+, b-) lie as `a+ b+ a- b-`, so sequence i and sequence B + i answer the same prompt.
    `ref_logps` fp32 [2B], of the sequences in their order; None where the reference is asked in each step.
    """

    sequences: TokenBatch
    margins: Tensor
    ref_logps: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return len(self.sequences.lengths) // 2


@dataclass(frozen=True)
class ScoredBatch:
    """B answers end to end, with their scores, fp32 [B]."""

    sequences: TokenBatch
    scores: Tensor


@dataclass(frozen=True)
class RankingBatch:
    """All answers of R rankings end to end, ranking by ranking, the best first; `counts` is how many each has."""

    sequences: TokenBatch
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LabelledBatch:
    """B labelled answers, then their B mismatched ones, end to end. `desirable` bool [B]; `ref_logps` fp32 [2B]."""

    sequences: TokenBatch
    desirable: Tensor
    ref_logps: Tensor | None = None


@dataclass(frozen=True)
class Episode:
    """One answer that the policy sampled. `sampling_logprobs` fp32 [k]: of each response token, as it was drawn (CPU).

    The response includes the token that ended it. `finished` is False where it was cut at `response_length` instead.
    `prompt` is the prompt's index in the dataset.
    """

    sequence: TokenSequence
    sampling_logprobs: Tensor
    finished: bool
    prompt: int

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def response(self) -> tuple[int, ...]:
        """The k response tokens."""
        return self.sequence.tokens[len(self.sequence) - len(self.sampling_logprobs) :]


@dataclass(frozen=True)
class Experience:
    """What PPO learns from one episode; fp32 [k] each on the CPU, one entry per response token.

    `old_values[t]` and `returns[t]` belong to the state before response token t, where it is chosen; the values are
    None where there is no critic.
    """

    episode: Episode
    old_logprobs: Tensor
    old_values: Tensor | None
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.episode)

    @property
    def num_response_tokens(self) -> int:
        return len(self.old_logprobs)


@dataclass(frozen=True)
class ExperienceBatch:
    """Experiences end to end. The per-token tensors are fp32 [r], in the order of `response_targets(sequences)`."""

    sequences: TokenBatch
    old_logprobs: Tensor
    old_values: Tensor | None
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class ResponseTargets:
    """Which flat row predicts which token. `rows`, `targets`, `sequence_ids`: int64 [r], in flat order."""

    rows: Tensor
    targets: Tensor
    sequence_ids: Tensor


def pack(sequences: Sequence[TokenSequence]) -> TokenBatch:
    """Lay sequences end to end (CPU tensors)."""
    lengths = tuple(len(sequence) for sequence in sequences)
    bounds = torch.tensor((0, *lengths)).cumsum(0)
    return TokenBatch(
        tokens=torch.tensor([token for sequence in sequences for token in sequence.tokens], dtype=torch.int64),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=bounds.to(torch.int32),
        response_mask=torch.tensor([flag for item in sequences for flag in item.response_mask], dtype=torch.bool),
        lengths=lengths,
    )


def pack_pairs(pairs: Sequence[PreferencePair]) -> PreferenceBatch:
    """Lay pairs end to end, chosen first, rejected after (CPU tensors)."""
    return PreferenceBatch(
        sequences=pack([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        ref_logps=known_logps([pair.ref_logps for pair in pairs]),
    )


def part(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Sequences `start` to `stop - 1` as a record of their own."""
    first = sum(batch.lengths[:start])
    cut = slice(first, sum(batch.lengths[:stop]))
    return TokenBatch(
        tokens=batch.tokens[cut],
        positions=batch.positions[cut],
        cu_seqlens=batch.cu_seqlens[start : stop + 1] - first,
        response_mask=batch.response_mask[cut],
        lengths=batch.lengths[start:stop],
    )


def known_logps(pairs: Sequence[tuple[float, float] | None]) -> Tensor | None:
    """The first of each, then the second of each, fp32; None where one is not known."""
    known = [pair for pair in pairs if pair is not None]
    return torch.tensor(known, dtype=torch.float32).T.flatten() if len(known) == len(pairs) else None


def pack_scored(examples: Sequence[ScoredSequence]) -> ScoredBatch:
    """Lay scored answers end to end (CPU tensors)."""
    scores = torch.tensor([example.score for example in examples], dtype=torch.float32)
    return ScoredBatch(pack([example.sequence for example in examples]), scores)


def pack_rankings(rankings: Sequence[Ranking]) -> RankingBatch:
    """Lay rankings end to end (CPU tensors)."""
    sequences = [sequence for ranking in rankings for sequence in ranking.sequences]
    return RankingBatch(pack(sequences), tuple(len(ranking.sequences) for ranking in rankings))


def pack_labelled(examples: Sequence[LabelledSequence]) -> LabelledBatch:
    """Lay labelled answers end to end, their mismatched ones after (CPU tensors)."""
    return LabelledBatch(
        sequences=pack([example.sequence for example in examples] + [example.mismatched for example in examples]),
        desirable=torch.tensor([example.desirable for example in examples]),
        ref_logps=known_logps([example.ref_logps for example in examples]),
    )


def pack_experience(experiences: Sequence[Experience]) -> ExperienceBatch:
    """Lay experiences end to end (CPU tensors)."""
    values = [experience.old_values for experience in experiences if experience.old_values is not None]
    return ExperienceBatch(
        sequences=pack([experience.episode.sequence for experience in experiences]),
        old_logprobs=torch.cat([experience.old_logprobs for experience in experiences]),
        old_values=torch.cat(values) if values else None,
        advantages=torch.cat([experience.advantages for experience in experiences]),
        returns=torch.cat([experience.returns for experience in experiences]),
    )


def response_targets(batch: TokenBatch) -> ResponseTargets:
    """Pair each response token with the row before it. The only shift by one in onecard.

    A response token that opens its sequence has nothing before it and is not predicted.
    """
    predicted = batch.response_mask & (batch.positions > 0)
    places = predicted.nonzero().squeeze(1)
    sequence_of = torch.bucketize(places, batch.cu_seqlens[1:-1].to(places.dtype), right=True)
    return ResponseTargets(rows=places - 1, targets=batch.tokens[places], sequence_ids=sequence_of)


def predicted_tokens(sequence: TokenSequence) -> int:
    """How many rows `response_targets` gives this sequence: what a step's normaliser counts."""
    return sum(sequence.response_mask[1:])


def last_rows(batch: TokenBatch) -> Tensor:
    """The flat row of each sequence's last token, int64 [S]: where a scalar head reads its score."""
    return batch.cu_seqlens[1:].to(torch.int64) - 1


def like_lengths(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of at most `size` items each, of like lengths: little is padded. The longest first: if memory lacks, then
    at once.

    >>> list(like_lengths([3, 9, 4], 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    yield from (order[start : start + size] for start in range(0, len(order), size))


def to_device(record: T, device: torch.device) -> T:
    """The same record with every tensor on `device`."""
    moved: dict[str, object] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            moved[item.name] = value.to(device, non_blocking=True)
        elif isinstance(value, TokenBatch):
            moved[item.name] = to_device(value, device)
        else:
            moved[item.name] = value
    return type(record)(**moved)
