"""Forward passes over sequences without gradients, in micro-batches."""

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
    """What `read` gives for each sequence of a record, in the order of `sequences`."""

    def read_record(places: list[int]) -> Sequence[R]:
        return read(to_device(pack([sequences[place] for place in places]), roles.device))

    lengths = [len(sequence) for sequence in sequences]
    return map_micro_batches(lengths, as_budget(size), read_record, padded=roles.layout == "padded")


def per_token(
    roles: Roles,
    role: str,
    episodes: Sequence[Episode],
    read: Callable[[TokenBatch, ResponseTargets], Tensor],
    size: int | TokenBudget,
    beyond: int = 0,
) -> list[Tensor]:
    """`read` of each episode's response tokens under a role, on the CPU, in the episodes' order.

    `read` gives `beyond` more numbers for each episode, after those of its tokens.
    """

    def pieces(batch: TokenBatch) -> list[Tensor]:
        lengths = [count + beyond for count in batch.num_targets]
        # a view would keep its whole batch alive
        return [piece.clone() for piece in read(batch, batch.targets).cpu().split(lengths)]

    with roles.active(role):
        return sequence_passes(roles, [episode.sequence for episode in episodes], size, pieces)
