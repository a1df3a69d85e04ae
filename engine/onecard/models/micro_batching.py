"""How items are split into micro-batches, by count or by a budget of tokens, and what is done when memory runs out.

    items, their sizes -> TokenBudget.size -> indices of each micro-batch -> read -> results, in the items' order

The split changes memory and time only: a step's normaliser is the whole step's, so every split gives the same gradient
to rounding (except for kto's KL and aot's sorts, which are computed per micro-batch). A pass that runs out of memory is
run again in smaller micro-batches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from onecard.config import TrainConfig
from onecard.data.batches import like_lengths
from onecard.utils.errors import OnecardError, is_out_of_memory
from onecard.utils.progress import say

R = TypeVar("R")


@dataclass(frozen=True)
class MicroBatchSize:
    """At most `sequences` items in a pass; with `tokens`, as many as that budget holds instead, and at least one.

    `padded`: items count as long as the longest of their micro-batch. `sort_by_length`: items are taken longest first
    by count, too. `max_items`: largest number of items, whatever the token budget allows (0: no limit).
    """

    sequences: int
    tokens: int = 0
    padded: bool = False
    sort_by_length: bool = False
    max_items: int = 0

    def split(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Which items make up each pass. By count in their order; by tokens the longest first, of like lengths.

        >>> list(MicroBatchSize(2).split([3, 9, 4]))
        [[0, 1], [2]]
        >>> list(MicroBatchSize(2, tokens=8).split([3, 9, 4]))
        [[1], [2, 0]]
        """
        order = list(range(len(sizes)))
        if self.sort_by_length or self.tokens:
            order = [place for alone in like_lengths(sizes, 1) for place in alone]
        held: list[int] = []
        total = longest = 0  # of those held
        for place in order:
            size = sizes[place]
            if held and not self.fits(len(held) + 1, total + size, max(longest, size)):
                yield held
                held, total, longest = [], 0, 0
            held.append(place)
            total, longest = total + size, max(longest, size)
        if held:
            yield held

    def fits(self, items: int, total: int, longest: int) -> bool:
        """Whether so many items fit into one pass."""
        if not self.tokens:
            return items <= self.sequences
        return (items * longest if self.padded else total) <= self.tokens and items <= (self.max_items or items)

    def halved(self, sizes: Sequence[int]) -> MicroBatchSize | None:
        """The cut to try where a pass of this one took too much memory; None where each was a single item.

        By tokens from there on: half of what the largest pass of several items held.
        """
        several = [each for each in self.split(sizes) if len(each) > 1]
        if not several:
            return None
        largest = max(self.tokens_of([sizes[place] for place in each]) for each in several)
        return replace(self, tokens=max(largest // 2, 1))

    def tokens_of(self, sizes: Sequence[int]) -> int:
        """What items take of the budget together."""
        return len(sizes) * max(sizes) if self.padded else sum(sizes)


@dataclass(frozen=True)
class RetryMessages:
    """What is said where memory runs out: `smaller` of the passes to come, `single` where one item was too much.

    In them `{size}` is the budget from there on, or what the item took.
    """

    smaller: str
    single: str
    shown: Callable[[int], str] = "{:,} tokens".format


MEMORY_ADVICE = (
    "Lower max_length (in ppo response_length too), or add --gradient_checkpointing, --load_in_4bit or a smaller "
    "--head_chunk_tokens; `onecard fit` says beforehand what fits."
)
FORWARD_MESSAGES = RetryMessages(
    smaller="passes without gradients of at most {size} from here on.",
    single="one sequence of {size} is too much for a pass without gradients. "
    "Lower max_length (in ppo response_length too), or add --load_in_4bit; `onecard fit` says beforehand what fits.",
)
TRAINING_MESSAGES = RetryMessages(
    smaller="micro-batches of at most {size} from here on; the step is done again, and nothing is lost.",
    single=f"an example of {{size}} is too much for a micro-batch of its own. {MEMORY_ADVICE}",
)


@dataclass
class TokenBudget:
    """How passes are cut. The cut gets smaller where memory runs out, and stays so; runs keep it in checkpoints."""

    size: MicroBatchSize
    wording: RetryMessages = FORWARD_MESSAGES

    def shrink(self, sizes: Sequence[int], *, padded: bool = False) -> None:
        """Items of these sizes have run out of memory: say so and cut smaller, or stop where each was alone."""
        smaller = replace(self.size, padded=padded).halved(sizes)
        if smaller is None:
            raise OnecardError("out of memory: " + self.wording.single.format(size=self.wording.shown(max(sizes))))
        self.size = replace(self.size, tokens=smaller.tokens)
        say("out of memory: " + self.wording.smaller.format(size=self.wording.shown(smaller.tokens)))


def as_budget(size: int | TokenBudget) -> TokenBudget:
    """A number of items as a budget of its own, in batches of like lengths."""
    return size if isinstance(size, TokenBudget) else TokenBudget(MicroBatchSize(size, sort_by_length=True))


def forward_budget(config: TrainConfig) -> TokenBudget:
    """The budget of a training run's passes without gradients."""
    return TokenBudget(
        MicroBatchSize(config.per_device_eval_batch_size, config.micro_batch_tokens, sort_by_length=True)
    )


def unless_out_of_memory(work: Callable[[], R]) -> tuple[R] | None:
    """The result of `work` in a tuple, or None if it ran out of memory; its tensors are freed then."""
    try:
        return (work(),)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return None


def free_memory() -> None:
    """Free what an exception held. Call it after the `except` block: until then the traceback keeps the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def run_micro_batches(
    sizes: Sequence[int], budget: TokenBudget, read: Callable[[list[int]], R], *, padded: bool = False
) -> list[tuple[list[int], R]]:
    """`(places, read(places))` of each pass over items of these sizes.

    Only a pass that has run out of memory is done again. `padded`: an item is as long as the longest of its pass.
    """
    found: list[tuple[list[int], R]] = []
    left = list(range(len(sizes)))
    while left:
        cut = replace(budget.size, padded=padded)
        for chosen in cut.split([sizes[place] for place in left]):
            places = [left[index] for index in chosen]
            done = unless_out_of_memory(partial(read, places))
            if done is None:
                budget.shrink([sizes[place] for place in places], padded=padded)
                break
            found.append((places, done[0]))
        read_by_now = {place for places, _ in found for place in places}
        left = [place for place in left if place not in read_by_now]
    return found


def map_micro_batches(
    sizes: Sequence[int], budget: TokenBudget, read: Callable[[list[int]], Sequence[R]], *, padded: bool = False
) -> list[R]:
    """What `read` gives for each item of a pass, in the items' order."""
    found: dict[int, R] = {}
    for places, results in run_micro_batches(sizes, budget, read, padded=padded):
        found.update(zip(places, results, strict=True))
    return [found[place] for place in range(len(sizes))]


@torch.no_grad()
def run_with_retry(sizes: Sequence[int], budget: TokenBudget, work: Callable[[int], R]) -> R:
    """What `work` gives, told how many items of these sizes may be held at once, each as large as the largest.

    Where memory runs out it is done again from its beginning, with fewer.
    """
    while True:
        largest = next(replace(budget.size, padded=True).split(sizes))
        done = unless_out_of_memory(partial(work, len(largest)))
        if done is not None:
            return done[0]
        budget.shrink([sizes[place] for place in largest], padded=True)
