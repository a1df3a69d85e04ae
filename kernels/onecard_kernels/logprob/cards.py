"""How large the tiles of the tiled kernel are on each card, and how much of the vocabulary one program takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from ..records import Head

MAX_SPLITS = 256  # one block of the second kernel holds all shares of its rows
START = 0.1  # filling the pipeline and writing the partials, in tiles


@dataclass(frozen=True)
class TileConfig:
    """A tile is `rows` x `columns` logits, `depth` of D at a time. `at_once` programs fit on one multiprocessor.

    Programs are numbered so that `group` row blocks share a piece of the head while it is in the L2 cache.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    at_once: int
    multiprocessors: int
    group: int = 16


# Sizes are limited by shared memory (99 KiB at 8.6, 8.9 and 12.0; 163 at 8.0; 227 at 9.0 and 10.0; 64 on AMD) and by
# registers: an accumulator of 128 per thread leaves just enough for the softmax, and little for the rest of the head.
# Two small programs on one multiprocessor hide each other's softmax; Hopper's and Blackwell's tensor cores need a wide
# tile, which reads less per product.
_PAIR = TileConfig(128, 128, 32, warps=4, stages=4, at_once=2, multiprocessors=128)
_SINGLE = replace(_PAIR, warps=8, at_once=1)
_DEEP = replace(_SINGLE, depth=64)
_WIDE = replace(_DEEP, columns=256)
_AMD = replace(_SINGLE, stages=2)
_FULL = TileConfig(64, 64, 32, warps=8, stages=3, at_once=2, multiprocessors=128)  # fp32 has no tensor cores


@dataclass(frozen=True)
class _Card:
    """`tile` serves heads with at most `extras` of bias, softcap and forbidden tokens without spilling, `other` all."""

    tile: TileConfig
    extras: int
    other: TileConfig
    multiprocessors: int


# By compute capability. Multiprocessors are those of the largest such card; a card that is there is asked.
_CARDS: dict[tuple[int, int], _Card] = {
    (8, 0): _Card(_PAIR, 0, _SINGLE, 108),
    (8, 6): _Card(_PAIR, 0, _SINGLE, 84),
    (8, 9): _Card(_PAIR, 0, _SINGLE, 128),
    (9, 0): _Card(_WIDE, 1, _DEEP, 132),
    (9, 4): _Card(_AMD, 3, _AMD, 304),  # gfx942
    (10, 0): _Card(_WIDE, 0, _DEEP, 148),
    (12, 0): _Card(_PAIR, 0, _SINGLE, 170),
}


def config_for(capability: tuple[int, int], dtype: torch.dtype, head: Head, sums: int = 0) -> TileConfig:
    """The tile for a card's compute capability; versions not in the table take the nearest one below.

    sums: how many of the entropy and the sum of squares are asked for.
    """
    if capability < (8, 0):
        raise ValueError(
            f"the tiled log-prob kernel needs compute capability 8.0 or more, this card has {capability[0]}."
            f"{capability[1]}: without bf16 tensor cores its tiles spill; use the chunked path"
        )
    card = _CARDS[max(c for c in _CARDS if c <= capability)]
    extras = sum(part is not None for part in (head.bias, head.softcap, head.forbidden)) + (2 if sums == 2 else 0)
    low = card.tile if extras <= card.extras else card.other
    return replace(_FULL if dtype == torch.float32 else low, multiprocessors=card.multiprocessors)


def config_on(device: torch.device, dtype: torch.dtype, head: Head, sums: int) -> TileConfig:
    if device.type != "cuda":
        return config_for((9, 0), dtype, head, sums)
    found = torch.cuda.get_device_properties(device)
    config = config_for((found.major, found.minor), dtype, head, sums)
    return replace(config, multiprocessors=found.multi_processor_count)


@cache
def tiles_per_program(row_blocks: int, tiles: int, config: TileConfig) -> int:
    """Tiles of the vocabulary for each program, so that the last wave of programs is nearly full.

    Where there are several groups of row blocks, one group alone fills the card: its rows then stay in the L2 cache.
    """
    slots = config.multiprocessors * config.at_once
    fill = _ceil(slots, config.group) if row_blocks > config.group else 1
    fewest = _ceil(tiles, MAX_SPLITS)
    most = max(fewest, tiles // fill)

    def time(per_program: int) -> float:
        programs = row_blocks * _ceil(tiles, per_program)
        waves: int = _ceil(programs, slots)
        return waves * (per_program + START)

    return min(range(fewest, most + 1), key=time)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
