"""CSV: from text to cells, and from the cells of a column to values.

A cell is text. A column is numbers only where all its numbers, written back, give the same text: `5` and `0.5` are
numbers; `05`, `1.50`, `True`, `NA`, `12:30` and `12345678901234567890123` stay what they are. An empty cell is null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from onecard.utils.errors import OnecardError

Cell: TypeAlias = str | None

# Text whatever it looks like: the answer to a sum is `4`, which a tokenizer needs as text.
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "answer", "solution")
NUMBER_COLUMNS = ("score", "margin")  # read as numbers even where they are written `1.50`
TRUTH_COLUMNS = ("label",)
TRUTHS: Mapping[str, Any] = {"true": True, "false": False, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def read_table(place: str, text: str, delimiter: str) -> Iterator[tuple[int, dict[str, Cell]]]:
    """The rows below the header, with the numbers that a spreadsheet shows; blank lines are counted and passed over."""
    header: list[str] | None = None
    for number, cells, line in records(place, text, delimiter):
        if header is None:
            header = [cell or "" for cell in cells]
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise OnecardError(f"{place}: the header names column '{twice}' twice.")
        elif len(cells) != len(header):
            raise broken(place, number, f"Expected {len(header)} columns, got {len(cells)}: {line[:200]}")
        else:
            yield number, dict(zip(header, cells, strict=True))


def records(place: str, text: str, delimiter: str) -> Iterator[tuple[int, list[Cell], str]]:
    """Each line that is not blank: its number, its cells and its text. An empty cell is None, but "" where quoted."""
    quoted = r'"([^"]*(?:""[^"]*)*)"'
    cell = re.compile(rf'(?:{quoted}|([^"{delimiter}\r\n][^{delimiter}\r\n]*)?)({delimiter}|\r\n|\r|\n|\Z)')
    position, start, number = 0, 0, 1
    cells: list[Cell] = []
    while True:
        found = cell.match(text, position)
        if found is None:
            closed = re.compile(quoted).match(text, position)
            raise broken(place, number, f"{'Text behind a closing quote' if closed else 'A quote is not closed'}")
        within, plain, end = found.groups()
        cells.append(plain if within is None else within.replace('""', '"'))
        position = found.end()
        if end != delimiter:
            line = text[start : found.start(3)]
            if line:
                yield number, cells, line
            if not end:
                return
            cells, start, number = [], position, number + 1


def broken(place: str, number: int, what: str) -> OnecardError:
    return OnecardError(f"{place}: CSV parse error: Row #{number}: {what}.")


def with_values(tables: Sequence[Mapping[str, Cell]]) -> list[dict[str, Any]]:
    """The rows of one or more CSV files with the values of their cells; what a column is, all its cells decide."""
    columns: dict[str, list[Cell]] = {}
    for row in tables:
        for name, cell in row.items():
            columns.setdefault(name, []).append(cell)
    readers = {name: cell_reader(name, cells) for name, cells in columns.items()}
    return [{name: readers[name](cell) for name, cell in row.items()} for row in tables]


def cell_reader(name: str, cells: Sequence[Cell]) -> Callable[[Cell], Any]:
    """From a cell of this column to its value."""
    if name == "prompt":
        return lambda cell: cell or ""  # what is answered without a question has an empty prompt, not none
    if name in TEXT_COLUMNS:
        return lambda cell: cell
    if all(exact_number(cell) is not None for cell in cells if cell):
        return lambda cell: exact_number(cell) if cell else None
    if name in NUMBER_COLUMNS:
        return lambda cell: any_number(cell) if cell else None
    if name in TRUTH_COLUMNS:
        return lambda cell: TRUTHS.get(cell.strip().lower(), cell) if cell else None
    return lambda cell: cell


def exact_number(cell: str) -> int | float | None:
    """The 64-bit number whose text is the cell, if there is one."""
    with suppress(ValueError):
        whole = int(cell)
        return whole if str(whole) == cell and -(2**63) <= whole < 2**63 else None
    with suppress(ValueError):
        value = float(cell)
        return value if str(value) == cell and math.isfinite(value) else None
    return None


def any_number(cell: str) -> float | str:
    """The number that a cell is, in whatever form; its text if it is none."""
    try:
        return cell if "_" in cell else float(cell)
    except ValueError:
        return cell
