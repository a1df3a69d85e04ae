"""PPO's training data: answers sampled by the policy, with log-probs, values, advantages and returns per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.data.batches.tokens import TokenBatch, TokenSequence, pack


@dataclass(frozen=True)
class Episode:
    """One prompt with an answer sampled by the policy.

    `sampling_logprobs` fp32 [k] (CPU): the log-prob of each response token when it was sampled. `finished`: the last
    token ended the response and is part of it; if false, the response was cut at `response_length`. `stop`: the stop
    string that ended the response, or empty.
    """

    sequence: TokenSequence
    sampling_logprobs: Tensor
    finished: bool
    stop: str = ""

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def response(self) -> tuple[int, ...]:
        """The k response tokens."""
        return self.sequence.tokens[len(self.sequence) - len(self.sampling_logprobs) :]

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The tokens before the response."""
        return self.sequence.tokens[: len(self.sequence) - len(self.sampling_logprobs)]


@dataclass(frozen=True)
class Experience:
    """PPO's training data of one episode. Tensors are fp32 [k] on the CPU, with one entry per response token.

    `old_values[t]` and `returns[t]` belong to the state before response token t, in which it is sampled. `old_values`
    is None without a critic.
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
    """Packed experiences. The per-token tensors are fp32 [r], in the order of `sequences.targets`."""

    sequences: TokenBatch
    old_logprobs: Tensor
    old_values: Tensor | None
    advantages: Tensor
    returns: Tensor


def pack_experience(experiences: Sequence[Experience]) -> ExperienceBatch:
    """Pack experiences (CPU tensors)."""
    values = [experience.old_values for experience in experiences if experience.old_values is not None]
    return ExperienceBatch(
        sequences=pack([experience.episode.sequence for experience in experiences]),
        old_logprobs=torch.cat([experience.old_logprobs for experience in experiences]),
        old_values=torch.cat(values) if values else None,
        advantages=torch.cat([experience.advantages for experience in experiences]),
        returns=torch.cat([experience.returns for experience in experiences]),
    )
