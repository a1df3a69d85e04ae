"""What is learned from answers that somebody else wrote: pairs, scores, rankings, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from onecard.data.batches.tokens import TokenBatch, TokenSequence, pack

# Tokens of a prompt: below, the rows saved are hardly more than what gathering each sequence's keys costs
# (`python -m benchmarks.sharing --shape 8/48` and less).
LEAST_SHARED = 8


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; `margin` is by how much the chosen one is better, in reward units, where known.

    `ref_logps`: both answers' summed log-probs under the reference (nats), where they were computed beforehand.
    """

    chosen: TokenSequence
    rejected: TokenSequence
    margin: float = 0.0
    ref_logps: tuple[float, float] | None = None

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """The chosen one, and the rejected one."""
        return self.chosen, self.rejected

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


def pack_pairs(pairs: Sequence[PreferencePair], *, share_prompts: bool = False) -> PreferenceBatch:
    """Lay pairs end to end, chosen first, rejected after (CPU tensors); the prompt once for both, if asked."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    firsts = [*range(len(pairs)), *range(len(pairs))]
    return PreferenceBatch(
        sequences=pack(sequences, shares(sequences, firsts) if share_prompts else None),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        ref_logps=known_logps([pair.ref_logps for pair in pairs]),
    )


def shares(sequences: Sequence[TokenSequence], firsts: Sequence[int]) -> dict[int, tuple[int, int]]:
    """What `pack` calls `continued`, where sequence i goes on from the prompt of `firsts[i]`, if that is not itself."""
    heads = ((i, j, shared_tokens(sequences[j], sequences[i])) for i, j in enumerate(firsts) if i != j)
    return {i: (j, head) for i, j, head in heads if head}


def shared_tokens(first: TokenSequence, second: TokenSequence) -> int:
    """How many tokens of their prompt two answers share; 0 for fewer than `LEAST_SHARED`.

    An answer's own tokens are never shared, nor is the last token: each sequence has at least one row.
    """
    most = min(len(first), len(second)) - 1
    places = zip(first.tokens, second.tokens, first.response_mask, second.response_mask, strict=False)
    differ = (place for place, (one, other, *learned) in enumerate(places) if one != other or any(learned))
    head = min(next(differ, most), most)
    return head if head >= LEAST_SHARED else 0


def rows_sharing(example: PreferencePair | Ranking) -> int:
    """Rows of the model that an example takes where its answers share their prompt."""
    first, *others = example.sequences
    return len(first) + sum(len(other) - shared_tokens(first, other) for other in others)


def known_logps(pairs: Sequence[tuple[float, float] | None]) -> Tensor | None:
    """The first of each, then the second of each, fp32; None where one is not known."""
    known = [pair for pair in pairs if pair is not None]
    return torch.tensor(known, dtype=torch.float32).T.flatten() if len(known) == len(pairs) else None


def pack_scored(examples: Sequence[ScoredSequence]) -> ScoredBatch:
    """Lay scored answers end to end (CPU tensors)."""
    scores = torch.tensor([example.score for example in examples], dtype=torch.float32)
    return ScoredBatch(pack([example.sequence for example in examples]), scores)


def pack_rankings(rankings: Sequence[Ranking], *, share_prompts: bool = False) -> RankingBatch:
    """Lay rankings end to end (CPU tensors); the prompt once for all answers of a ranking, if asked."""
    sequences = [sequence for ranking in rankings for sequence in ranking.sequences]
    counts = tuple(len(ranking.sequences) for ranking in rankings)
    firsts = [start for start, count in zip(accumulate((0, *counts)), counts, strict=False) for _ in range(count)]
    return RankingBatch(pack(sequences, shares(sequences, firsts) if share_prompts else None), counts)


def pack_labelled(examples: Sequence[LabelledSequence]) -> LabelledBatch:
    """Lay labelled answers end to end, their mismatched ones after (CPU tensors)."""
    return LabelledBatch(
        sequences=pack([example.sequence for example in examples] + [example.mismatched for example in examples]),
        desirable=torch.tensor([example.desirable for example in examples]),
        ref_logps=known_logps([example.ref_logps for example in examples]),
    )
