"""Rewards from a LoRA adapter and its scalar head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.data import Prompt, Row, sft_examples
from onecard.data.batches import Episode, TokenSequence
from onecard.data.templates import answer_end_tokens, closing_token
from onecard.models.micro_batching import TokenBudget
from onecard.models.passes import sequence_passes
from onecard.models.roles import Roles
from onecard.rewards.answers import RewardInput
from onecard.rollout import find_stop_tokens, tokens_before_end


def score(
    roles: Roles, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], *, max_length: int, batch_size: int
) -> list[float]:
    """One reward for each prompt and response. They are tokenized as the reward model's training pairs were."""
    rows = [
        Row("responses", number, {"prompt": prompt, "completion": response})
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=1)
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
    roles: Roles, sequences: Sequence[TokenSequence], *, batch_size: int | TokenBudget, role: str = "reward"
) -> list[float]:
    """One reward for each sequence, in their order: the scalar head's output at the last token.

    `role`: the adapter and head that score.
    """
    with roles.active(role):
        return sequence_passes(roles, sequences, batch_size, lambda batch: roles.scores(batch).tolist())


@dataclass(frozen=True)
class AdapterReward:
    """The reward of an adapter on the run's own base model. `role` is `reward` or `constraint`."""

    role: str

    def __call__(self, inputs: RewardInput) -> list[float]:
        stop_tokens = find_stop_tokens(inputs.roles, inputs.tokenizer)
        answers = zip(inputs.prompts, inputs.episodes, strict=True)
        sequences = [with_closing_token(prompt, episode, inputs.tokenizer, stop_tokens) for prompt, episode in answers]
        return score_sequences(inputs.roles, sequences, batch_size=inputs.batch_size, role=self.role)


def with_closing_token(prompt: Prompt, episode: Episode, tokenizer: Any, stop_tokens: Collection[int]) -> TokenSequence:
    """The sampled tokens of prompt and answer, with the token at the end that closes answers in reward training.

    The reward model was trained to score at that token, not at the last token of a cut answer or at another end token.
    A stop string or another end token is removed before the closing token is appended.
    """
    chat = prompt.messages is not None
    closing = closing_token(tokenizer, chat=chat)
    last = episode.response[-1]
    if last == closing or (chat and last in answer_end_tokens(tokenizer).chat_ids):
        return episode.sequence
    stopped = bool(episode.stop) or last in stop_tokens
    without_end = tokens_before_end(
        tokenizer, episode.prompt_tokens, episode.response, finished=stopped, stop=episode.stop
    )
    tokens = (*episode.prompt_tokens, *without_end, closing)
    return TokenSequence(tokens, (False,) * len(episode.prompt_tokens) + (True,) * (len(without_end) + 1))
