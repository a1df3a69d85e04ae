"""Splits items into micro-batches, by count or by a token budget, and retries smaller ones when memory runs out.

    items and their sizes -> TokenBudget.size -> indices of each micro-batch -> read -> results, in the items' order

The split affects memory and time only. The loss is normalised over the whole step, so every split gives the same
gradient up to rounding (except for kto's KL and aot's sorts, which are computed per micro-batch).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from onecard.config import TrainConfig
from onecard.data.batches import longest_first
from onecard.utils.errors import OnecardError, is_out_of_memory
from onecard.utils.progress import say

R = TypeVar("R")


@dataclass(frozen=True)
class MicroBatchSize:
    """The size of a micro-batch: `sequences` items or, with `tokens` > 0, at most `tokens` tokens (at least one item).

    `padded`: every item counts as long as the longest of its micro-batch. `sort_by_length`: a split by count takes the
    longest items first too. `max_items`: largest number of items with a token budget (0: no limit).
    """

    sequences: int
    tokens: int = 0
    padded: bool = False
    sort_by_length: bool = False
    max_items: int = 0

    def split(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """The indices of the items of each micro-batch. By count: in order; by tokens: longest first, similar lengths.

        >>> list(MicroBatchSize(2).split([3, 9, 4]))
        [[0, 1], [2]]
        >>> list(MicroBatchSize(2, tokens=8).split([3, 9, 4]))
        [[1], [2, 0]]
        """
        order = list(range(len(sizes)))
        if self.sort_by_length or self.tokens:
            order = longest_first(sizes)
        indices: list[int] = []
        total = longest = 0  # sizes of the items in `indices`
        for index in order:
            size = sizes[index]
            if indices and not self.fits(len(indices) + 1, total + size, max(longest, size)):
                yield indices
                indices, total, longest = [], 0, 0
            indices.append(index)
            total, longest = total + size, max(longest, size)
        if indices:
            yield indices

    def fits(self, items: int, total: int, longest: int) -> bool:
        """Whether `items` items fit into one micro-batch: `total` tokens, the longest with `longest`."""
        if not self.tokens:
            return items <= self.sequences
        return (items * longest if self.padded else total) <= self.tokens and items <= (self.max_items or items)

    def halved(self, sizes: Sequence[int]) -> MicroBatchSize | None:
        """The size to try after an out-of-memory error; None if every micro-batch has a single item.

        Its token budget is half the tokens of the largest micro-batch with several items.
        """
        several = [indices for indices in self.split(sizes) if len(indices) > 1]
        if not several:
            return None
        largest = max(self.tokens_of([sizes[index] for index in indices]) for indices in several)
        return replace(self, tokens=max(largest // 2, 1))

    def tokens_of(self, sizes: Sequence[int]) -> int:
        """Tokens of the budget that these items take together."""
        return len(sizes) * max(sizes) if self.padded else sum(sizes)


@dataclass(frozen=True)
class RetryMessages:
    """Messages for out-of-memory retries: `smaller` if the token budget is halved, `single` if one item does not fit.

    `{size}` in them is the new budget, or the size of the item; `format_size` formats it.
    """

    smaller: str
    single: str
    format_size: Callable[[int], str] = "{:,} tokens".format


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
    """The current micro-batch size. It gets smaller when memory runs out, and stays so; checkpoints store it."""

    size: MicroBatchSize
    messages: RetryMessages = FORWARD_MESSAGES

    def shrink(self, sizes: Sequence[int], *, padded: bool = False) -> None:
        """After items of these sizes ran out of memory, print a message and halve the budget.

        Raises `OnecardError` if every micro-batch had a single item.
        """
        smaller = replace(self.size, padded=padded).halved(sizes)
        if smaller is None:
            raise OnecardError(
                "out of memory: " + self.messages.single.format(size=self.messages.format_size(max(sizes)))
            )
        self.size = replace(self.size, tokens=smaller.tokens)
        say("out of memory: " + self.messages.smaller.format(size=self.messages.format_size(smaller.tokens)))


def as_budget(size: int | TokenBudget) -> TokenBudget:
    """A number of items as a budget, in batches of similar lengths; a budget is returned as it is."""
    return size if isinstance(size, TokenBudget) else TokenBudget(MicroBatchSize(size, sort_by_length=True))


def forward_budget(config: TrainConfig) -> TokenBudget:
    """The budget of a training run's forward passes without gradients."""
    return TokenBudget(
        MicroBatchSize(config.per_device_eval_batch_size, config.micro_batch_tokens, sort_by_length=True)
    )


def unless_out_of_memory(work: Callable[[], R]) -> tuple[R] | None:
    """The result of `work` in a tuple; None if it ran out of memory. Its tensors are freed in that case."""
    try:
        return (work(),)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return None


def free_memory() -> None:
    """Free the tensors of an exception's traceback. Call it after the `except` block, which keeps them alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def run_micro_batches(
    sizes: Sequence[int], budget: TokenBudget, read: Callable[[list[int]], R], *, padded: bool = False
) -> list[tuple[list[int], R]]:
    """`(indices, read(indices))` for each micro-batch of items of these sizes, without gradients.

    Only a micro-batch that ran out of memory is run again. `padded`: an item counts as long as the longest of its
    micro-batch.
    """
    results: list[tuple[list[int], R]] = []
    remaining = list(range(len(sizes)))
    while remaining:
        size = replace(budget.size, padded=padded)
        for chosen in size.split([sizes[index] for index in remaining]):
            indices = [remaining[position] for position in chosen]
            result = unless_out_of_memory(partial(read, indices))
            if result is None:
                budget.shrink([sizes[index] for index in indices], padded=padded)
                break
            results.append((indices, result[0]))
        done = {index for indices, _ in results for index in indices}
        remaining = [index for index in remaining if index not in done]
    return results


def map_micro_batches(
    sizes: Sequence[int], budget: TokenBudget, read: Callable[[list[int]], Sequence[R]], *, padded: bool = False
) -> list[R]:
    """The results of `read`, which returns one for each item of its micro-batch, in the items' order."""
    by_index: dict[int, R] = {}
    for indices, results in run_micro_batches(sizes, budget, read, padded=padded):
        by_index.update(zip(indices, results, strict=True))
    return [by_index[index] for index in range(len(sizes))]


@torch.no_grad()
def run_with_retry(sizes: Sequence[int], budget: TokenBudget, work: Callable[[int], R]) -> R:
    """The result of `work(count)`; `count`: how many items of the largest size fit into the budget.

    If memory runs out, `work` is run again from its beginning with a smaller `count`.
    """
    while True:
        largest = next(replace(budget.size, padded=True).split(sizes))
        result = unless_out_of_memory(partial(work, len(largest)))
        if result is not None:
            return result[0]
        budget.shrink([sizes[index] for index in largest], padded=True)
