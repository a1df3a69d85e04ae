"""Scores from a reward adapter and its scalar head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.batches import TokenSequence
from onecard.data import Row, sft_examples
from onecard.models.roles import Roles
from onecard.passes import Budget, sequence_passes
from onecard.rewards.answers import Case
from onecard.rollout import end_tokens


def score(
    roles: Roles, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], *, max_length: int, batch_size: int
) -> list[float]:
    """One reward for each prompt with its response, tokenized as the training pairs were."""
    rows = [
        Row("responses", place, {"prompt": prompt, "completion": response})
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=1)
    ]
    examples = sft_examples(
        rows,
        tokenizer,
        max_length=max_length,
        completion_only_loss=True,
        assistant_only_loss=True,
        skip_bad_rows=False,
    ).examples
    return score_sequences(roles, examples, batch_size=batch_size, role=roles.current)


def score_sequences(
    roles: Roles, sequences: Sequence[TokenSequence], *, batch_size: int | Budget, role: str = "reward"
) -> list[float]:
    """One reward for each sequence, read at its last token: the tokens as they were sampled, never tokenized again.

    The scores come back in the order of `sequences`. `role` is whose adapter and head are asked.
    """
    with roles.playing(role):
        return sequence_passes(roles, sequences, batch_size, lambda batch: roles.scores(batch).tolist())


@dataclass(frozen=True)
class AdapterReward:
    """The reward of a role of the run's own base: `reward`, or `constraint`."""

    role: str

    def __call__(self, case: Case) -> list[float]:
        ends = end_tokens(case.roles, case.tokenizer)
        sequences = [ended(episode.sequence, ends, case.tokenizer.eos_token_id) for episode in case.episodes]
        return score_sequences(case.roles, sequences, batch_size=case.batch_size, role=self.role)


def ended(sequence: TokenSequence, ends: Collection[int], eos: int) -> TokenSequence:
    """The sequence as the reward model knows texts: its training pairs end with EOS, and its score was read there.

    Without it, an answer that was cut, or that a stop token ended, would be scored at a place that was never trained.
    """
    if sequence.tokens[-1] in ends:
        return sequence
    return TokenSequence((*sequence.tokens, eos), (*sequence.response_mask, True))
