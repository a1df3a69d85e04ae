"""GPUs by name, and how much of a card's memory a run can use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onecard.utils.errors import OnecardError, did_you_mean

GIB = 2**30

# Memory in GiB by the vendor's product name. A "GB" in a product name is a GiB of memory.
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

# Memory that tensors cannot use: the driver and ECC reserve some, the CUDA context with its kernels takes some, and
# PyTorch's caching allocator loses some to fragmentation. These are assumptions; the output lists them separately.
RESERVED_SHARE = 0.04  # share of the card's memory: a 12 GB card reports about 11.6 GiB
CONTEXT_GIB = 0.5
FRAGMENTATION = 0.05  # share of the peak


@dataclass(frozen=True)
class Card:
    """A card and its memory, in bytes."""

    name: str
    memory: int

    @property
    def usable(self) -> int:
        """Bytes that the driver does not reserve."""
        return int(self.memory * (1 - RESERVED_SHARE))

    def needed(self, peak: int) -> int:
        """Bytes that a run needs: the peak of its tensors, the CUDA context and fragmentation."""
        return peak + context_bytes() + fragmentation_bytes(peak)

    def holds(self, peak: int) -> bool:
        """Whether a run fits on this card if its tensors take at most `peak` bytes."""
        return self.needed(peak) <= self.usable


SMALLEST_MODEL_NUMBER = 1000  # from here on, a number without a unit is the name of a card (4090), not a size


def context_bytes() -> int:
    """Bytes of the CUDA context."""
    return int(CONTEXT_GIB * GIB)


def fragmentation_bytes(peak: int) -> int:
    """Bytes lost to fragmentation if tensors take `peak` bytes."""
    return int(FRAGMENTATION * peak)


def normalized_name(name: str) -> str:
    """A card's name in lower case, without the vendor, spaces, hyphens and underscores."""
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def find_card(name: str) -> Card:
    """The card for `24GB`, `24GiB`, `24` or a name in `CARDS`. Unknown names raise `OnecardError`."""
    size = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(g|gb|gib)?", name.strip().lower())
    if size and (size[2] or float(size[1]) < SMALLEST_MODEL_NUMBER):
        memory = int(float(size[1]) * GIB)
        if memory <= 0:
            raise OnecardError(f"card: {name}, expected a size above 0, such as 24GB, or a card's name.")
        return Card(f"{float(size[1]):g} GiB", memory)
    known = {normalized_name(card_name): card_name for card_name in CARDS}
    match = known.get(normalized_name(name)) or known.get(normalized_name(f"rtx{name}"))
    if match is None:
        hint = did_you_mean(normalized_name(name), known) and did_you_mean(name, CARDS)
        raise OnecardError(
            f"card: no card is called '{name}'; expected a size such as 24GB, or one of {', '.join(CARDS)}.{hint}"
        )
    return Card(match, CARDS[match] * GIB)


def smallest_card(peak: int) -> Card | None:
    """The card in `CARDS` with the least memory on which a run fits; None if it fits on none."""
    fitting = [Card(name, size * GIB) for name, size in CARDS.items() if Card(name, size * GIB).holds(peak)]
    return min(fitting, key=lambda card: card.memory, default=None)
