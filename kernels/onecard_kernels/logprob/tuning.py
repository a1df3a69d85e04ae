"""Tile sizes: of the linear path by device (`TABLE`), and of the tiled Triton kernel by GPU (`_CARDS`).

The linear path multiplies with the head in tiles of `rows` tokens by `columns` of the vocabulary:

- chunked      A tile has all columns: few, large products. The softmax is complete after one tile, so a token whose
               coefficient is zero needs no second product.
- low_memory   A tile has some of the columns. The softmax is kept online from tile to tile, as flash attention does
               over keys. The workspace is the smallest, and each part of the head is read once for both products.
- tiled        Forward passes only, on Triton: the logits stay on the chip.

The argument `chunk_tokens` of a linear function sets `rows` for one call. `with tuning.override(...)` sets everything
for a block of code, and ONECARD_LINEAR, ONECARD_ROWS and ONECARD_COLUMNS for a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..records import Head

ALIGNED = 64  # logits; rows of a tile that start at a multiple of it are read and multiplied with wide loads
CHUNKED, LOW_MEMORY, TILED = "chunked", "low_memory", "tiled"
IMPLEMENTATIONS = (CHUNKED, LOW_MEMORY, TILED)


@dataclass(frozen=True)
class TileSizes:
    """Tokens and vocabulary columns of one tile. `columns=None`: all of them."""

    implementation: str
    rows: int
    columns: int | None = None


@dataclass(frozen=True)
class Choice:
    """A row of `TABLE`: a device's default implementation, and the tile sizes of chunked and of low_memory."""

    default: str
    row_bytes: int  # chunked: bytes of a chunk of logits
    least_rows: int  # chunked: with fewer, a product is bound by reading the head
    most_rows: int  # chunked
    tile_rows: int  # low_memory
    tile_columns: int  # low_memory


# CPU: measured (benchmarks/results/cpu-2-cores/). With tiles of 2048 x 2048 logits (16 MiB) both products are as fast
# as bare GEMMs and read each part of the head once. Chunks of as much memory read the whole head every 200 tokens.
# CUDA: calculated, not measured yet. With 256 rows the second product fills a quarter of a large GPU, with 1024 nearly
# all of it. 2048 x 4096 logits stay in a 50 MB cache between product and softmax.
TABLE: dict[str, Choice] = {
    "cpu": Choice(LOW_MEMORY, 48 << 20, 64, 1 << 20, 2048, 2048),
    "cuda": Choice(CHUNKED, 512 << 20, 256, 1024, 2048, 4096),
}

_overrides: list[dict[str, str | int]] = []


@contextmanager
def override(
    *, implementation: str | None = None, rows: int | None = None, columns: int | None = None
) -> Iterator[None]:
    """Use another implementation or other tile sizes in the linear functions that run inside.

    The backward of a trained head computes the logits again. It reads the override that is active when it runs.

    Args:
        implementation: "chunked", "low_memory" or "tiled". "tiled" has no gradient: where one is needed, and where
            Triton does not run, "chunked" runs instead.
        rows: tokens of a tile, 1 or more. The argument `chunk_tokens` of a function overrides it.
        columns: vocabulary columns of a tile, 1 or more; used by low_memory.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    given = {"implementation": implementation, "rows": rows, "columns": columns}
    _overrides.append(_checked({name: value for name, value in given.items() if value is not None}))
    try:
        yield
    finally:
        _overrides.pop()


def choose(
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    only: str | None = None,
    chunk_tokens: int | None = None,
) -> TileSizes:
    """The tile sizes for logits of `dtype` on `device`.

    Args:
        only: an implementation that overrides the default, `override` and the environment.
        chunk_tokens: rows of a tile; None: from the override, the environment or the table.
    """
    choice = TABLE.get(device.type, TABLE["cuda"])
    settings = _overrides[-1] if _overrides else _environment()
    implementation = only or str(settings.get("implementation", choice.default))
    columns: int | None
    if implementation == LOW_MEMORY:
        rows, columns = choice.tile_rows, int(settings.get("columns", choice.tile_columns))
    else:
        rows, columns = choice.row_bytes // (vocabulary * dtype.itemsize), None
        rows = min(choice.most_rows, max(choice.least_rows, rows))
    return TileSizes(implementation, chunk_tokens or int(settings.get("rows", rows)), columns)


def columns_of(sizes: TileSizes, vocabulary: int, tokens: int) -> int:
    """Columns of a tile. A tile of few tokens gets more columns, up to the same number of logits."""
    if sizes.columns is None:
        return vocabulary
    rows = max(1, min(sizes.rows, tokens))
    widened = sizes.columns * sizes.rows // rows // ALIGNED * ALIGNED
    return min(vocabulary, max(sizes.columns, widened))


def _environment() -> dict[str, str | int]:
    variables = {"implementation": "ONECARD_LINEAR", "rows": "ONECARD_ROWS", "columns": "ONECARD_COLUMNS"}
    return _checked({name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)})


def _checked(settings: dict[str, str | int]) -> dict[str, str | int]:
    implementation = settings.get("implementation")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    for name in ("rows", "columns"):
        if name in settings and (not str(settings[name]).isdecimal() or int(settings[name]) < 1):
            raise ValueError(f"{name} is {settings[name]!r}, expected a whole number of 1 or more")
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# The tiled Triton kernel: the tile of a program, and the number of tiles that a program takes.

MAX_SPLITS = 256  # one block of the second kernel holds all splits of its rows
START = 0.1  # time to fill the pipeline and to write the partial results, in units of a tile's time


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
# registers: an accumulator of 128 per thread leaves enough for the softmax, and few for bias, softcap and forbidden.
# With two small programs on one multiprocessor, one multiplies while the other computes its softmax. Hopper's and
# Blackwell's tensor cores need a wide tile, which reads less per product.
_PAIR = TileConfig(128, 128, 32, warps=4, stages=4, at_once=2, multiprocessors=128)
_SINGLE = replace(_PAIR, warps=8, at_once=1)
_DEEP = replace(_SINGLE, depth=64)
_WIDE = replace(_DEEP, columns=256)
_AMD = replace(_SINGLE, stages=2)
_FULL = TileConfig(64, 64, 32, warps=8, stages=3, at_once=2, multiprocessors=128)  # fp32 has no tensor cores


@dataclass(frozen=True)
class _Card:
    """`tile` is for heads with at most `extras` of bias, softcap and forbidden; with more it would spill: `other`."""

    tile: TileConfig
    extras: int
    other: TileConfig
    multiprocessors: int


# By compute capability. The multiprocessors are those of the largest such GPU; `config_on` takes a real GPU's.
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
    """The tile for a compute capability; one that is not in the table takes the nearest below.

    sums: 0 to 2, how many of entropy and sum of squares are computed.
    """
    if capability < (8, 0):
        raise ValueError(
            f"the tiled log-prob kernel needs compute capability 8.0 or more, this card has {capability[0]}."
            f"{capability[1]}: without bf16 tensor cores its tiles spill; use the chunked path"
        )
    card = _CARDS[max(c for c in _CARDS if c <= capability)]
    extras = sum(part is not None for part in (head.bias, head.softcap, head.forbidden)) + (2 if sums == 2 else 0)
    sixteen_bit = card.tile if extras <= card.extras else card.other
    return replace(_FULL if dtype == torch.float32 else sixteen_bit, multiprocessors=card.multiprocessors)


def config_on(device: torch.device, dtype: torch.dtype, head: Head, sums: int) -> TileConfig:
    if device.type != "cuda":
        return config_for((9, 0), dtype, head, sums)
    properties = torch.cuda.get_device_properties(device)
    config = config_for((properties.major, properties.minor), dtype, head, sums)
    return replace(config, multiprocessors=properties.multi_processor_count)


@cache
def tiles_per_program(row_blocks: int, tiles: int, config: TileConfig) -> int:
    """Tiles of the vocabulary for each program, so that the last wave of programs is nearly full.

    With several groups of row blocks, each group alone fills the GPU, so that its rows stay in the L2 cache.
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
