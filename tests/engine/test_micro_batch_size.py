"""Cuts into passes: every item once, no pass beyond its budget, and halving always comes to an end."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from onecard.data.batches import longest_first
from onecard.models.micro_batching import MicroBatchSize

DRAWS = range(300)


def drawn(seed: int) -> tuple[MicroBatchSize, list[int]]:
    """Sizes of all kinds, many of them equal, and a cut that may be smaller or larger than any of them."""
    random_of = random.Random(seed)
    sizes = [random_of.choice((1, 7, random_of.randint(1, 60))) for _ in range(random_of.randint(0, 25))]
    cut = MicroBatchSize(
        random_of.randint(1, 8),
        tokens=random_of.choice((0, 1, random_of.randint(1, 200))),
        padded=random_of.random() < 0.5,
        sort_by_length=random_of.random() < 0.5,
        max_items=random_of.choice((0, 0, 1, 3)),
    )
    return cut, sizes


def weight(cut: MicroBatchSize, sizes: list[int]) -> int:
    """What a pass takes, counted anew: each padded item is as long as the longest."""
    return sum(max(sizes) if cut.padded else size for size in sizes)


def test_every_item_is_in_one_pass_and_no_pass_is_over_its_budget():
    for seed in DRAWS:
        cut, sizes = drawn(seed)
        passes = list(cut.split(sizes))
        assert sorted(place for each in passes for place in each) == list(range(len(sizes)))
        assert all(passes)
        for each in passes:
            held = [sizes[place] for place in each]
            if cut.tokens:
                assert len(each) == 1 or weight(cut, held) <= cut.tokens
                assert len(each) <= (cut.max_items or len(each))
                assert held == sorted(held, reverse=True)
            else:
                assert len(each) <= cut.sequences
            assert cut.tokens_of(held) == weight(cut, held)


def test_a_pass_is_as_full_as_its_budget_allows():
    """The first item of the next pass would have been too much."""
    for seed in DRAWS:
        cut, sizes = drawn(seed)
        passes = list(cut.split(sizes))
        for each, following in pairwise(passes):
            more = [sizes[place] for place in [*each, following[0]]]
            if cut.tokens:
                assert weight(cut, more) > cut.tokens or len(each) == cut.max_items
            else:
                assert len(each) == cut.sequences


def test_halving_makes_progress_and_ends_at_single_items():
    for seed in DRAWS:
        cut, sizes = drawn(seed)
        rounds = 0
        while (smaller := cut.halved(sizes)) is not None:
            before, after = (
                [weight(each, held) for places in each.split(sizes) if len(held := [sizes[p] for p in places]) > 1]
                for each in (cut, smaller)
            )
            assert max(after, default=0) <= max(before) // 2  # what is left of several items in a pass is half as large
            assert smaller == replace(cut, tokens=smaller.tokens)
            cut, rounds = smaller, rounds + 1
        assert all(len(places) == 1 for places in cut.split(sizes))
        assert rounds <= 11  # 25 items of 60 tokens: 2^11


def test_a_long_item_beside_short_ones_does_not_hold_halving_up():
    """By hand: 60 + 10 + 10 tokens, then 40: 60 | 10 + 10, then half of the 20, not of the 60."""
    cut = MicroBatchSize(8)
    assert list(cut.split([60, 10, 10])) == [[0, 1, 2]]
    cut = cut.halved([60, 10, 10])
    assert (cut.tokens, list(cut.split([60, 10, 10]))) == (40, [[0], [1, 2]])
    cut = cut.halved([60, 10, 10])
    assert (cut.tokens, list(cut.split([60, 10, 10]))) == (10, [[0], [1], [2]])
    assert cut.halved([60, 10, 10]) is None
    assert MicroBatchSize(8).halved([]) is None


def test_padding_counts():
    """9 and 3 take 12 packed, and 18 padded."""
    assert [len(each) for each in MicroBatchSize(8, tokens=12).split([3, 9])] == [2]
    assert [len(each) for each in MicroBatchSize(8, tokens=17, padded=True).split([3, 9])] == [1, 1]
    assert [len(each) for each in MicroBatchSize(8, tokens=18, padded=True).split([3, 9])] == [2]


def test_batches_by_count_are_longest_first_or_in_order():
    for seed in DRAWS:
        cut, sizes = drawn(seed)
        order = longest_first(sizes)
        assert list(MicroBatchSize(cut.sequences, sort_by_length=True).split(sizes)) == [
            order[start : start + cut.sequences] for start in range(0, len(order), cut.sequences)
        ]
        assert [place for each in MicroBatchSize(cut.sequences).split(sizes) for place in each] == list(
            range(len(sizes))
        )
