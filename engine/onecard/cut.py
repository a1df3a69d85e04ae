"""How items are cut into passes over the model: by count, or by a budget of tokens.

A cut changes memory and time and nothing else: a step's normaliser is the whole step's, so every cut gives the same
gradient to rounding (but for kto, whose KL is each micro-batch's own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from onecard.batches import like_lengths


@dataclass(frozen=True)
class Cut:
    """At most `sequences` items in a pass; with `tokens`, as many as that budget holds instead, and at least one.

    `padded`: a pass's items count as long as its longest one. `like`: by count, too, the longest first, of like
    lengths. `most`: no more items than that in a pass, whatever the budget holds (0: no such bound).
    """

    sequences: int
    tokens: int = 0
    padded: bool = False
    like: bool = False
    most: int = 0

    def places(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Which items make up each pass. By count in their order; by tokens the longest first, of like lengths.

        >>> list(Cut(2).places([3, 9, 4]))
        [[0, 1], [2]]
        >>> list(Cut(2, tokens=8).places([3, 9, 4]))
        [[1], [2, 0]]
        """
        order = list(range(len(sizes)))
        if self.like or self.tokens:
            order = [place for alone in like_lengths(sizes, 1) for place in alone]
        held: list[int] = []
        total = longest = 0  # of those held
        for place in order:
            size = sizes[place]
            if held and not self.holds(len(held) + 1, total + size, max(longest, size)):
                yield held
                held, total, longest = [], 0, 0
            held.append(place)
            total, longest = total + size, max(longest, size)
        if held:
            yield held

    def holds(self, items: int, total: int, longest: int) -> bool:
        """Whether so many items fit into one pass."""
        if not self.tokens:
            return items <= self.sequences
        return (items * longest if self.padded else total) <= self.tokens and items <= (self.most or items)

    def halved(self, sizes: Sequence[int]) -> Cut | None:
        """The cut to try where a pass of this one took too much memory; None where each was a single item.

        By tokens from there on: half of what the largest pass of several items held.
        """
        several = [each for each in self.places(sizes) if len(each) > 1]
        if not several:
            return None
        largest = max(self.tokens_of([sizes[place] for place in each]) for each in several)
        return replace(self, tokens=max(largest // 2, 1))

    def tokens_of(self, sizes: Sequence[int]) -> int:
        """What items take of the budget together."""
        return len(sizes) * max(sizes) if self.padded else sum(sizes)
