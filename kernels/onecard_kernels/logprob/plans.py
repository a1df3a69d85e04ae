"""How the linear path cuts its work: the small table behind `backend="auto"`, and how to overrule it.

The products with the head run over tiles of `rows` tokens by `columns` of the vocabulary:

- chunked      a tile has all columns: few, large products, and the softmax is over when the tile is. A token whose
               coefficient turns out to be zero needs no second product.
- low_memory   a tile has some of the columns, with the softmax kept online from tile to tile, as flash attention does
               over keys: the smallest workspace, and each part of the head is read once for both products.
- tiled        forward passes alone, on Triton: the logits stay on the chip.

Overrule the table for a while with `with plans.override(implementation="low_memory", rows=512): ...`, for a whole
process with ONECARD_LINEAR=low_memory (and ONECARD_ROWS, ONECARD_COLUMNS).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

ALIGNED = 64  # logits; tiles whose rows begin there are read and multiplied with wide loads
CHUNKED, LOW_MEMORY, TILED = "chunked", "low_memory", "tiled"
IMPLEMENTATIONS = (CHUNKED, LOW_MEMORY, TILED)


@dataclass(frozen=True)
class Plan:
    """Tokens and vocabulary columns of one tile. `columns=None`: all of them."""

    implementation: str
    rows: int
    columns: int | None = None


@dataclass(frozen=True)
class Choice:
    """A line of the table: the sizes of each implementation on one kind of device, and which of them is the default."""

    default: str
    row_bytes: int  # of a chunk of logits
    least_rows: int  # below it a product is bound by reading the head
    most_rows: int
    tile_rows: int
    tile_columns: int


# CPU: benchmarks/results/cpu-2-cores/. Tiles of 2048 x 2048 logits (16 MiB) run both products at the rate of the bare
# ones and read each part of the head once; chunks of the same memory read all of it every 200 tokens.
# CUDA: not measured yet; from arithmetic. At 256 rows the second product fills a quarter of a large chip, at 1024
# nearly all of it, and 2048 x 4096 logits stay in a 50 MB cache between product and pass.
TABLE: dict[str, Choice] = {
    "cpu": Choice(LOW_MEMORY, 48 << 20, 64, 1 << 20, 2048, 2048),
    "cuda": Choice(CHUNKED, 512 << 20, 256, 1024, 2048, 4096),
}

_overrides: list[dict[str, str | int]] = []


@contextmanager
def override(
    *, implementation: str | None = None, rows: int | None = None, columns: int | None = None
) -> Iterator[None]:
    """Inside, the linear functions run as told: another implementation, or tiles of another size.

    That goes for what runs inside: the backward of a trained head forms the logits again, and is told anew.

    Args:
        implementation: "chunked", "low_memory" or "tiled" ("tiled" forms no gradients: where one is asked for, and
            where Triton does not run, it means "chunked").
        rows: tokens of a tile, 1 or more.
        columns: vocabulary columns of a tile, 1 or more; of low_memory alone.
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
) -> Plan:
    """The plan for logits of `dtype` on `device`; `only`: what is asked for can be done in one way alone."""
    choice = TABLE.get(device.type, TABLE["cuda"])
    wanted = _overrides[-1] if _overrides else _environment()
    implementation = only or str(wanted.get("implementation", choice.default))
    if implementation == LOW_MEMORY:
        plan = Plan(LOW_MEMORY, choice.tile_rows, choice.tile_columns)
    else:
        rows = choice.row_bytes // (vocabulary * dtype.itemsize)
        plan = Plan(implementation, min(choice.most_rows, max(choice.least_rows, rows)))
    rows = int(wanted.get("rows", plan.rows))
    columns = int(wanted["columns"]) if plan.columns is not None and "columns" in wanted else plan.columns
    return replace(plan, rows=rows, columns=columns)


def columns_of(plan: Plan, vocabulary: int, tokens: int) -> int:
    """Columns of a tile. A tile of few tokens gets more of them, to the same number of logits."""
    if plan.columns is None:
        return vocabulary
    rows = max(1, min(plan.rows, tokens))
    more = plan.columns * plan.rows // rows // ALIGNED * ALIGNED
    return min(vocabulary, max(plan.columns, more))


def _environment() -> dict[str, str | int]:
    named = {"implementation": "ONECARD_LINEAR", "rows": "ONECARD_ROWS", "columns": "ONECARD_COLUMNS"}
    return _checked({name: os.environ[variable] for name, variable in named.items() if os.environ.get(variable)})


def _checked(wanted: dict[str, str | int]) -> dict[str, str | int]:
    implementation = wanted.get("implementation")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    for name in ("rows", "columns"):
        if name in wanted and (not str(wanted[name]).isdecimal() or int(wanted[name]) < 1):
            raise ValueError(f"{name} is {wanted[name]!r}, expected a whole number of 1 or more")
    return wanted
