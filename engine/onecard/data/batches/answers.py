"""Training data with answers from a dataset: preference pairs, scored answers, rankings, labelled answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from onecard.data.batches.tokens import TokenBatch, TokenSequence, pack

# Prompts with fewer common tokens are not shared: computing them twice costs hardly more than gathering each
# sequence's keys (`python -m benchmarks.sharing --shape 8/48`, and shorter shapes).
MIN_SHARED_TOKENS = 8


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt. `margin`: the chosen one's reward minus the rejected one's; 0 if unknown.

    `ref_logps`: both answers' summed log-probs under the reference model (nats), if precomputed.
    """

    chosen: TokenSequence
    rejected: TokenSequence
    margin: float = 0.0
    ref_logps: tuple[float, float] | None = None

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """The chosen answer, then the rejected one."""
        return self.chosen, self.rejected

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class ScoredSequence:
    """A prompt with one answer, and the answer's score from the dataset."""

    sequence: TokenSequence
    score: float

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class Ranking:
    """Two or more answers to one prompt, best first."""

    sequences: tuple[TokenSequence, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class LabelledSequence:
    """A prompt with one answer, and whether the answer is desirable.

    `mismatched` is the same prompt with the answer to another prompt: KTO estimates its KL to the reference model on
    it. It is empty if the loss does not need it.
    `ref_logps`: summed log-probs (nats) of `sequence` and `mismatched` under the reference model, if precomputed.
    """

    sequence: TokenSequence
    desirable: bool
    mismatched: TokenSequence
    ref_logps: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.sequence) + len(self.mismatched)


@dataclass(frozen=True)
class PreferenceBatch:
    """B pairs as 2B sequences: the chosen ones first (0..B-1), then the rejected ones (B..2B-1). `margins` fp32 [B].

    Pairs (a+, a-) and (b+, b-) are packed as `a+ b+ a- b-`: sequences i and B + i answer the same prompt.
    `ref_logps` fp32 [2B], in the order of the sequences; None if the reference log-probs are computed in each step.
    """

    sequences: TokenBatch
    margins: Tensor
    ref_logps: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return len(self.sequences.lengths) // 2


@dataclass(frozen=True)
class ScoredBatch:
    """B packed answers, and their scores fp32 [B]."""

    sequences: TokenBatch
    scores: Tensor


@dataclass(frozen=True)
class RankingBatch:
    """All answers of R packed rankings, ranking by ranking, best first. `counts[i]`: number of answers of ranking i."""

    sequences: TokenBatch
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LabelledBatch:
    """B packed labelled answers, then their B mismatched ones. `desirable` bool [B]; `ref_logps` fp32 [2B]."""

    sequences: TokenBatch
    desirable: Tensor
    ref_logps: Tensor | None = None


def pack_pairs(pairs: Sequence[PreferencePair], *, share_prompts: bool = False) -> PreferenceBatch:
    """Pack pairs, chosen first, then rejected (CPU tensors). `share_prompts`: pack the prompt once for both answers."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    firsts = [*range(len(pairs)), *range(len(pairs))]
    return PreferenceBatch(
        sequences=pack(sequences, shared_prefixes(sequences, firsts) if share_prompts else None),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        ref_logps=ref_logps_tensor([pair.ref_logps for pair in pairs]),
    )


def shared_prefixes(sequences: Sequence[TokenSequence], firsts: Sequence[int]) -> dict[int, tuple[int, int]]:
    """The argument `shared_prefixes` of `pack`.

    `firsts[i]`: index of the first sequence with the prompt of sequence i; i itself if no earlier one has it.
    """
    shared = ((i, j, shared_tokens(sequences[j], sequences[i])) for i, j in enumerate(firsts) if i != j)
    return {i: (j, length) for i, j, length in shared if length}


def shared_tokens(first: TokenSequence, second: TokenSequence) -> int:
    """The number of prompt tokens that two answers share; 0 for fewer than `MIN_SHARED_TOKENS`.

    Response tokens are never shared, nor is the last token: each sequence keeps at least one row.
    """
    limit = min(len(first), len(second)) - 1
    columns = zip(first.tokens, second.tokens, first.response_mask, second.response_mask, strict=False)
    differences = (index for index, (one, other, *masks) in enumerate(columns) if one != other or any(masks))
    length = min(next(differences, limit), limit)
    return length if length >= MIN_SHARED_TOKENS else 0


def size_when_sharing(example: PreferencePair | Ranking) -> int:
    """Tokens of an example in a packed batch in which its answers share their prompt."""
    first, *others = example.sequences
    return len(first) + sum(len(other) - shared_tokens(first, other) for other in others)


def ref_logps_tensor(pairs: Sequence[tuple[float, float] | None]) -> Tensor | None:
    """The examples' `ref_logps`: the first of each, then the second of each, fp32 [2B]; None if any are None."""
    computed = [pair for pair in pairs if pair is not None]
    return torch.tensor(computed, dtype=torch.float32).T.flatten() if len(computed) == len(pairs) else None


def pack_scored(examples: Sequence[ScoredSequence]) -> ScoredBatch:
    """Pack scored answers (CPU tensors)."""
    scores = torch.tensor([example.score for example in examples], dtype=torch.float32)
    return ScoredBatch(pack([example.sequence for example in examples]), scores)


def pack_rankings(rankings: Sequence[Ranking], *, share_prompts: bool = False) -> RankingBatch:
    """Pack rankings (CPU tensors). `share_prompts`: pack the prompt once for all answers of a ranking."""
    sequences = [sequence for ranking in rankings for sequence in ranking.sequences]
    counts = tuple(len(ranking.sequences) for ranking in rankings)
    firsts = [start for start, count in zip(accumulate((0, *counts)), counts, strict=False) for _ in range(count)]
    return RankingBatch(pack(sequences, shared_prefixes(sequences, firsts) if share_prompts else None), counts)


def pack_labelled(examples: Sequence[LabelledSequence]) -> LabelledBatch:
    """Pack labelled answers, then their mismatched ones (CPU tensors)."""
    return LabelledBatch(
        sequences=pack([example.sequence for example in examples] + [example.mismatched for example in examples]),
        desirable=torch.tensor([example.desirable for example in examples]),
        ref_logps=ref_logps_tensor([example.ref_logps for example in examples]),
    )
