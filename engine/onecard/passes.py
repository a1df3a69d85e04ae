"""Passes over the model without gradients, in one loop; and what is done where memory runs out, here and in training.

    items, their sizes -> Budget.cut -> the places of each pass -> read -> results, in the items' order

A pass that runs out of memory is done again in smaller ones. What is read of an item does not depend on what else is in
its pass, but for rounding (and for kto's KL and aot's sorts, which are each pass's own).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from onecard.batches import Episode, ResponseTargets, TokenBatch, TokenSequence, pack, to_device
from onecard.config import TrainConfig
from onecard.cut import Cut
from onecard.errors import OnecardError, is_out_of_memory
from onecard.metrics import say
from onecard.models.roles import Roles

R = TypeVar("R")


@dataclass(frozen=True)
class Wording:
    """What is said where memory runs out: `smaller` of the passes to come, `single` where one item was too much.

    In them `{size}` is the budget from there on, or what the item took.
    """

    smaller: str
    single: str
    shown: Callable[[int], str] = "{:,} tokens".format


HELP = (
    "Lower max_length (in ppo response_length too), or add --gradient_checkpointing, --load_in_4bit or a smaller "
    "--head_chunk_tokens; `onecard fit` says beforehand what fits."
)
LOOKING = Wording(
    smaller="passes without gradients of at most {size} from here on.",
    single="one sequence of {size} is too much for a pass without gradients. "
    "Lower max_length (in ppo response_length too), or add --load_in_4bit; `onecard fit` says beforehand what fits.",
)
LEARNING = Wording(
    smaller="micro-batches of at most {size} from here on; the step is done again, and nothing is lost.",
    single=f"an example of {{size}} is too much for a micro-batch of its own. {HELP}",
)


@dataclass
class Budget:
    """How passes are cut. The cut gets smaller where memory runs out, and stays so; runs keep it in checkpoints."""

    cut: Cut
    wording: Wording = LOOKING

    def shrink(self, sizes: Sequence[int], *, padded: bool = False) -> None:
        """Items of these sizes have run out of memory: say so and cut smaller, or stop where each was alone."""
        smaller = replace(self.cut, padded=padded).halved(sizes)
        if smaller is None:
            raise OnecardError("out of memory: " + self.wording.single.format(size=self.wording.shown(max(sizes))))
        self.cut = replace(self.cut, tokens=smaller.tokens)
        say("out of memory: " + self.wording.smaller.format(size=self.wording.shown(smaller.tokens)))


def budget_of(size: int | Budget) -> Budget:
    """A number of items as a budget of its own, in batches of like lengths."""
    return size if isinstance(size, Budget) else Budget(Cut(size, like=True))


def looking_budget(config: TrainConfig) -> Budget:
    """The budget of a training run's passes without gradients."""
    return Budget(Cut(config.per_device_eval_batch_size, config.micro_batch_tokens, like=True))


def attempt(work: Callable[[], R]) -> tuple[R] | None:
    """What `work` gives, in a tuple of its own; None where it ran out of memory, and then all that it held is free."""
    try:
        return (work(),)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Only here is the exception gone: until then its traceback keeps the frames, and their tensors, of what failed.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


@torch.no_grad()
def each_pass(
    sizes: Sequence[int], budget: Budget, read: Callable[[list[int]], R], *, padded: bool = False
) -> list[tuple[list[int], R]]:
    """`(places, read(places))` of each pass over items of these sizes.

    Only a pass that has run out of memory is done again. `padded`: an item is as long as the longest of its pass.
    """
    found: list[tuple[list[int], R]] = []
    left = list(range(len(sizes)))
    while left:
        cut = replace(budget.cut, padded=padded)
        for chosen in cut.places([sizes[place] for place in left]):
            places = [left[index] for index in chosen]
            done = attempt(partial(read, places))
            if done is None:
                budget.shrink([sizes[place] for place in places], padded=padded)
                break
            found.append((places, done[0]))
        read_by_now = {place for places, _ in found for place in places}
        left = [place for place in left if place not in read_by_now]
    return found


def each_item(
    sizes: Sequence[int], budget: Budget, read: Callable[[list[int]], Sequence[R]], *, padded: bool = False
) -> list[R]:
    """What `read` gives for each item of a pass, in the items' order."""
    found: dict[int, R] = {}
    for places, results in each_pass(sizes, budget, read, padded=padded):
        found.update(zip(places, results, strict=True))
    return [found[place] for place in range(len(sizes))]


@torch.no_grad()
def at_once(sizes: Sequence[int], budget: Budget, work: Callable[[int], R]) -> R:
    """What `work` gives, told how many items of these sizes may be held at once, each as large as the largest.

    Where memory runs out it is done again from its beginning, with fewer.
    """
    while True:
        largest = next(replace(budget.cut, padded=True).places(sizes))
        done = attempt(partial(work, len(largest)))
        if done is not None:
            return done[0]
        budget.shrink([sizes[place] for place in largest], padded=True)


def sequence_passes(
    roles: Roles, sequences: Sequence[TokenSequence], size: int | Budget, read: Callable[[TokenBatch], Sequence[R]]
) -> list[R]:
    """What `read` gives for each sequence of a record, in the order of `sequences`."""

    def read_record(places: list[int]) -> Sequence[R]:
        return read(to_device(pack([sequences[place] for place in places]), roles.device))

    lengths = [len(sequence) for sequence in sequences]
    return each_item(lengths, budget_of(size), read_record, padded=roles.layout == "padded")


def per_token(
    roles: Roles,
    role: str,
    episodes: Sequence[Episode],
    read: Callable[[TokenBatch, ResponseTargets], Tensor],
    size: int | Budget,
    beyond: int = 0,
) -> list[Tensor]:
    """`read` of each episode's response tokens under a role, on the CPU, in the episodes' order.

    `read` gives `beyond` more numbers for each episode, after those of its tokens.
    """

    def pieces(batch: TokenBatch) -> list[Tensor]:
        lengths = [count + beyond for count in batch.num_targets]
        # a view would keep its whole batch alive
        return [piece.clone() for piece in read(batch, batch.targets).cpu().split(lengths)]

    with roles.playing(role):
        return sequence_passes(roles, [episode.sequence for episode in episodes], size, pieces)
