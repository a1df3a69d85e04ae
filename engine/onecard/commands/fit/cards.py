"""Cards by name, and what of a card's memory a run may have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onecard.utils.errors import OnecardError, nearest

GIB = 2**30

# Memory by the makers' names. A GB on a box is a GiB of chips.
CARDS: dict[str, int] = {
    "RTX 3060": 12,
    "RTX 4060 Ti": 16,
    "RTX 4070": 12,
    "RTX 4070 Ti Super": 16,
    "RTX 4080": 16,
    "RTX 5060 Ti": 16,
    "RTX 5070": 12,
    "RTX 5070 Ti": 16,
    "RTX 5080": 16,
    "RTX 3090": 24,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "L4": 24,
    "A10": 24,
    "L40S": 48,
    "A100 40GB": 40,
    "A100 80GB": 80,
    "H100": 80,
}

# What is not the run's: the driver and ECC keep some, CUDA's context with its kernels takes some more, and PyTorch's
# allocator cannot use every gap between what it has handed out. Assumptions, stated apart in every answer.
RESERVED_SHARE = 0.04  # of the card: a 12 GB one reports about 11.6 GiB
CONTEXT_GIB = 0.5
FRAGMENTATION = 0.05  # of the peak


@dataclass(frozen=True)
class Card:
    """A card and its memory, in bytes."""

    name: str
    memory: int

    @property
    def usable(self) -> int:
        """What the driver leaves."""
        return int(self.memory * (1 - RESERVED_SHARE))

    def needed(self, peak: int) -> int:
        """What a run takes of the card whose tensors take `peak` at most."""
        return peak + context() + fragmentation(peak)

    def holds(self, peak: int) -> bool:
        return self.needed(peak) <= self.usable


LEAST_NAME = 1000  # a number without a unit from here on is a card's: 4090


def context() -> int:
    return int(CONTEXT_GIB * GIB)


def fragmentation(peak: int) -> int:
    return int(FRAGMENTATION * peak)


def plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def find_card(name: str) -> Card:
    """`24GB`, `24GiB`, `24` or a card's name."""
    size = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(g|gb|gib)?", name.strip().lower())
    if size and (size[2] or float(size[1]) < LEAST_NAME):
        memory = int(float(size[1]) * GIB)
        if memory <= 0:
            raise OnecardError(f"card: {name}, expected a size above 0, such as 24GB, or a card's name.")
        return Card(f"{float(size[1]):g} GiB", memory)
    known = {plain(each): each for each in CARDS}
    found = known.get(plain(name)) or known.get(plain(f"rtx{name}"))
    if found is None:
        hint = nearest(plain(name), known) and nearest(name, CARDS)
        raise OnecardError(
            f"card: no card is called '{name}'; expected a size such as 24GB, or one of {', '.join(CARDS)}.{hint}"
        )
    return Card(found, CARDS[found] * GIB)


def smallest(peak: int) -> Card | None:
    """The smallest card by name that holds a run."""
    fitting = [Card(name, size * GIB) for name, size in CARDS.items() if Card(name, size * GIB).holds(peak)]
    return min(fitting, key=lambda card: card.memory, default=None)
