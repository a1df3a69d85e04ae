"""How sequences are cut into passes over the model: by count, or by a budget of tokens.

A cut changes memory and time and nothing else: a step's normaliser is the whole step's, so every cut gives the same
gradient to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onecard.batches import like_lengths


@dataclass(frozen=True)
class Cut:
    """At most `sequences` items in a pass; with `tokens`, as many as that budget holds instead, and at least one.

    `padded`: a pass's items count as long as its longest one.
    """

    sequences: int
    tokens: int = 0
    padded: bool = False

    def places(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Which items make up each pass. By count in their order; by tokens the longest first, of like lengths.

        >>> list(Cut(2).places([3, 9, 4]))
        [[0, 1], [2]]
        >>> list(Cut(2, tokens=8).places([3, 9, 4]))
        [[1], [2, 0]]
        """
        if not self.tokens:
            yield from (
                list(range(start, min(start + self.sequences, len(sizes))))
                for start in range(0, len(sizes), self.sequences)
            )
            return
        held: list[int] = []
        for place in (place for alone in like_lengths(sizes, 1) for place in alone):
            longest = sizes[held[0]] if held else 0
            taken = longest * (len(held) + 1) if self.padded else sum(sizes[each] for each in held) + sizes[place]
            if held and taken > self.tokens:
                yield held
                held = []
            held.append(place)
        if held:
            yield held

    def halved(self, sizes: Sequence[int]) -> Cut | None:
        """The cut to try where this one's largest pass took too much memory; None where that was a single item.

        By tokens from there on: half of what the largest pass held.
        """
        passes = list(self.places(sizes))
        if all(len(each) == 1 for each in passes):
            return None
        largest = max(self.tokens_of([sizes[place] for place in each]) for each in passes)
        return Cut(self.sequences, max(largest // 2, 1), self.padded)

    def tokens_of(self, sizes: Sequence[int]) -> int:
        """What items take of the budget together."""
        return len(sizes) * max(sizes) if self.padded else sum(sizes)
