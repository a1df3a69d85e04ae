"""The held-out split and the order of training examples. Both depend only on the seed and the data."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from onecard.data.example_arrays import Examples
from onecard.utils.errors import OnecardError

Example = TypeVar("Example")


def hold_out(
    examples: Sequence[Example], groups: Sequence[Hashable], *, test_size: float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Split into (train, held out). A `test_size` below 1 is a share (rounded up), else it is a count.

    Examples of one group (`Tokenized.groups`: one prompt, or copies of one text) stay together, so that no held-out
    prompt is trained on. If prompts repeat, fewer than `test_size` may be held out. If every prompt has more examples
    than that, all examples of the rarest one are held out. Both parts keep the order of `examples`. Raises OnecardError
    if nothing is left to train on.

        >>> hold_out([1, 2, 3, 4, 5], ["a", "b", "c", "d", "a"], test_size=2, seed=0)
        ([1, 4, 5], [2, 3])
    """
    size = num_held_out(len(examples), test_size)
    if size == 0:
        return examples, take(examples, [])
    by_group: dict[Hashable, list[int]] = {}
    for index, group in zip(range(len(examples)), groups, strict=True):
        by_group.setdefault(group, []).append(index)
    if size >= len(examples) or len(by_group) == 1:
        raise OnecardError(
            f"test_size: {test_size:g} of {len(examples)} examples with {len(by_group)} different prompts would leave "
            "nothing to train on; set a smaller test_size, or 0, or an eval_dataset."
        )
    order = list(by_group.values())
    random.Random(seed).shuffle(order)
    held_out: set[int] = set()
    for indices in order:
        if len(held_out) + len(indices) <= size:
            held_out.update(indices)
    rarest: list[int] = min(order, key=len)
    held_out = held_out or set(rarest)
    train = [index for index in range(len(examples)) if index not in held_out]
    return take(examples, train), take(examples, sorted(held_out))


def take(examples: Sequence[Example], indices: Sequence[int]) -> Sequence[Example]:
    """The examples at `indices`, in that order."""
    return examples.take(indices) if isinstance(examples, Examples) else [examples[index] for index in indices]


def num_held_out(count: int, test_size: float) -> int:
    """The number of examples to hold out: `test_size` is a share below 1, or a count."""
    if not (math.isfinite(test_size) and test_size >= 0):
        raise OnecardError(f"test_size: expected a share below 1, a count, or 0; got {test_size}.")
    if test_size < 1:
        return math.ceil(count * test_size - 1e-9)  # 0.07 * 100 is slightly more than 7
    if test_size != int(test_size):
        raise OnecardError(f"test_size: expected a share below 1 or a whole number of examples, got {test_size:g}.")
    return int(test_size)


def step_indices(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's shuffled indices in batches. Every index occurs once; the last batch may be smaller.

    >>> step_indices(5, 2, seed=0, epoch=0)
    [[1, 0], [3, 4], [2]]
    """
    if num_examples < 0 or batch_size < 1:
        raise ValueError(f"expected num_examples >= 0 and batch_size >= 1, got {num_examples} and {batch_size}")
    order = list(range(num_examples))
    random.Random(f"{seed} {epoch}").shuffle(order)  # string seed: adjacent seeds and epochs give unrelated orders
    return [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]


def stream_indices(num_examples: int, start: int, count: int, *, seed: int) -> list[int]:
    """`count` entries from offset `start` of an endless stream of shuffled epochs. All batches have the same size.

    >>> stream_indices(3, 0, 6, seed=0), stream_indices(3, 2, 2, seed=0)
    ([0, 2, 1, 0, 1, 2], [1, 0])
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), num_examples)
        [order] = step_indices(num_examples, num_examples, seed=seed, epoch=epoch)
        indices += order[offset : offset + count - len(indices)]
    return indices
