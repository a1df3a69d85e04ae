"""Batches for training, and the only place that pairs a hidden state with the token it predicts.

Batches are packed: sequences are concatenated without padding, and `cu_seqlens` has the offset of each. Batches hold no
pad tokens. `models/layout.py` adds padding before the forward pass, for models that need it.

A worked example, two sequences `[7 8 | 9 2]` and `[7 | 5 2]` (prompt | response):

    tokens         7  8  9  2  7  5  2
    positions      0  1  2  3  0  1  2
    cu_seqlens     0           4        7
    response_mask  .  .  x  x  .  x  x

Its `targets`: the hidden state of each of `rows` predicts the token in `targets`, which is the token at the next row.

    rows           1  2  4  5
    targets        9  2  5  2
    sequence_ids   0  0  1  1

Two answers to one prompt can share the prompt's rows. `[7 8 | 9 2]` and `[7 8 | 5 2]` then take six rows instead of
eight. Only the answer of the second sequence is packed; it attends to the prompt's rows, then to its own.

    tokens         7  8  9  2  5  2
    positions      0  1  2  3  2  3        shared.spans      (0, 0) (0, 2)
    cu_seqlens     0           4     6     shared.key_rows   0 1 2 3   0 1 4 5
    rows           1  2  1  4              targets           9 2 5 2

In PPO the same two answers are episodes, sampled by the policy. `ExperienceBatch.old_logprobs`, `old_values`,
`advantages` and `returns` have one entry for each of the r = 4 rows above, in that order.
"""

from onecard.data.batches.answers import (
    MIN_SHARED_TOKENS,
    LabelledBatch,
    LabelledSequence,
    PreferenceBatch,
    PreferencePair,
    Ranking,
    RankingBatch,
    ScoredBatch,
    ScoredSequence,
    pack_labelled,
    pack_pairs,
    pack_rankings,
    pack_scored,
    ref_logps_tensor,
    shared_tokens,
    size_when_sharing,
)
from onecard.data.batches.episodes import Episode, Experience, ExperienceBatch, pack_experience
from onecard.data.batches.tokens import (
    ResponseTargets,
    SharedPrompts,
    TokenBatch,
    TokenSequence,
    last_rows,
    longest_first,
    pack,
    predicted_tokens,
    slice_sequences,
    to_device,
    unpack,
)

__all__ = [
    "MIN_SHARED_TOKENS",
    "Episode",
    "Experience",
    "ExperienceBatch",
    "LabelledBatch",
    "LabelledSequence",
    "PreferenceBatch",
    "PreferencePair",
    "Ranking",
    "RankingBatch",
    "ResponseTargets",
    "ScoredBatch",
    "ScoredSequence",
    "SharedPrompts",
    "TokenBatch",
    "TokenSequence",
    "last_rows",
    "longest_first",
    "pack",
    "pack_experience",
    "pack_labelled",
    "pack_pairs",
    "pack_rankings",
    "pack_scored",
    "predicted_tokens",
    "ref_logps_tensor",
    "shared_tokens",
    "size_when_sharing",
    "slice_sequences",
    "to_device",
    "unpack",
]
