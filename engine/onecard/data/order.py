"""Which examples are held out, and in which order the others are learned. Both depend on the seed and nothing else."""

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
    """Split into (train, held out); `test_size` is a share below 1 (rounded up), else a count.

    Examples of one group (`Tokenized.groups`: one prompt, or copies of one text) stay together: an answer to a prompt
    that was trained on says little about new prompts. So where prompts repeat, fewer than `test_size` may be held out,
    or a few more if even the rarest prompt has more examples than that. Both keep the order of `examples`.

        >>> hold_out([1, 2, 3, 4, 5], ["a", "b", "c", "d", "a"], test_size=2, seed=0)
        ([1, 4, 5], [2, 3])
    """
    wanted = target(len(examples), test_size)
    if wanted == 0:
        return examples, take(examples, [])
    places: dict[Hashable, list[int]] = {}
    for index, group in zip(range(len(examples)), groups, strict=True):
        places.setdefault(group, []).append(index)
    if wanted >= len(examples) or len(places) == 1:
        raise OnecardError(
            f"test_size: {test_size:g} of {len(examples)} examples with {len(places)} different prompts would leave "
            "nothing to train on; give fewer, or 0, or an eval_dataset."
        )
    order = list(places.values())
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for indices in order:
        if len(held) + len(indices) <= wanted:
            held.update(indices)
    rarest: list[int] = min(order, key=len)
    held = held or set(rarest)
    train = [index for index in range(len(examples)) if index not in held]
    return take(examples, train), take(examples, sorted(held))


def take(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """Some of the examples, in the order of `places`."""
    return examples.take(places) if isinstance(examples, Examples) else [examples[place] for place in places]


def target(count: int, test_size: float) -> int:
    """How many examples `test_size` asks for."""
    if not (math.isfinite(test_size) and test_size >= 0):
        raise OnecardError(f"test_size: expected a share below 1, a count, or 0; got {test_size}.")
    if test_size < 1:
        return math.ceil(count * test_size - 1e-9)  # 0.07 * 100 is a little more than 7
    if test_size != int(test_size):
        raise OnecardError(f"test_size: from 1 on it is a count of examples, so {test_size:g} is not one.")
    return int(test_size)


def step_indices(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's shuffled indices in batches; every index once, the last batch short if they do not divide.

    >>> step_indices(5, 2, seed=0, epoch=0)
    [[1, 0], [3, 4], [2]]
    """
    if num_examples < 0 or batch_size < 1:
        raise ValueError(f"expected num_examples >= 0 and batch_size >= 1, got {num_examples} and {batch_size}")
    order = list(range(num_examples))
    random.Random(f"{seed} {epoch}").shuffle(order)  # of a string: neighbouring seeds and epochs give unrelated orders
    return [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]


def stream_indices(num_examples: int, start: int, count: int, *, seed: int) -> list[int]:
    """`count` entries from place `start` of an endless stream of shuffled epochs: no batch is short, none is left out.

    >>> stream_indices(3, 0, 6, seed=0), stream_indices(3, 2, 2, seed=0)
    ([0, 2, 1, 0, 1, 2], [1, 0])
    """
    found: list[int] = []
    while len(found) < count:
        epoch, place = divmod(start + len(found), num_examples)
        [order] = step_indices(num_examples, num_examples, seed=seed, epoch=epoch)
        found += order[place : place + count - len(found)]
    return found
