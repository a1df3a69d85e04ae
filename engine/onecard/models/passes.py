"""Forward passes without gradients over sequences, in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from onecard.data.batches import Episode, ResponseTargets, TokenBatch, TokenSequence, pack, to_device
from onecard.models.micro_batching import TokenBudget, as_budget, map_micro_batches
from onecard.models.roles import Roles

R = TypeVar("R")


def sequence_passes(
    roles: Roles, sequences: Sequence[TokenSequence], size: int | TokenBudget, read: Callable[[TokenBatch], Sequence[R]]
) -> list[R]:
    """The result of `read` for each sequence, in the order of `sequences`. `read` returns one result per sequence."""

    def read_batch(indices: list[int]) -> Sequence[R]:
        return read(to_device(pack([sequences[index] for index in indices]), roles.device))

    lengths = [len(sequence) for sequence in sequences]
    return map_micro_batches(lengths, as_budget(size), read_batch, padded=roles.layout == "padded")


def per_token(
    roles: Roles,
    role: str,
    episodes: Sequence[Episode],
    read: Callable[[TokenBatch, ResponseTargets], Tensor],
    size: int | TokenBudget,
    extra: int = 0,
) -> list[Tensor]:
    """One tensor for each episode: the results of `read` for its response tokens under a role, on the CPU.

    `read` returns a flat tensor: for each episode, one number per response token and then `extra` more numbers.
    """

    def pieces(batch: TokenBatch) -> list[Tensor]:
        lengths = [count + extra for count in batch.num_targets]
        # clone: a view would keep the tensor of the whole batch alive
        return [piece.clone() for piece in read(batch, batch.targets).cpu().split(lengths)]

    with roles.active(role):
        return sequence_passes(roles, [episode.sequence for episode in episodes], size, pieces)
