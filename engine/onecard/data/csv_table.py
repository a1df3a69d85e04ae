"""Parse CSV text into cells, and convert the cells of a column to values.

A column is converted to numbers only if each number, written back, gives the text of its cell: `5` and `0.5` are
numbers; `05`, `1.50`, `True`, `NA`, `12:30` and `12345678901234567890123` stay text. An empty cell is null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from onecard.utils.errors import OnecardError

Cell: TypeAlias = str | None

# Always text, also if every cell is a number: a completion of `4` has to be tokenized.
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "answer", "solution")
NUMBER_COLUMNS = ("score", "margin")  # numbers even if written `1.50`
BOOLEAN_COLUMNS = ("label",)
BOOLEANS: Mapping[str, Any] = {"true": True, "false": False, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def read_table(path: str, text: str, delimiter: str) -> Iterator[tuple[int, dict[str, Cell]]]:
    """(row number, cells by column name) of each row below the header. Blank lines are skipped, but have numbers.

    Row numbers are those of a spreadsheet: the header is row 1. Raises OnecardError if the CSV is malformed.
    """
    header: list[str] | None = None
    for number, cells, line in records(path, text, delimiter):
        if header is None:
            header = [cell or "" for cell in cells]
            duplicate = next((name for name in header if header.count(name) > 1), None)
            if duplicate is not None:
                raise OnecardError(f"{path}: the header names column '{duplicate}' twice.")
        elif len(cells) != len(header):
            raise parse_error(path, number, f"Expected {len(header)} columns, got {len(cells)}: {line[:200]}")
        else:
            yield number, dict(zip(header, cells, strict=True))


def records(path: str, text: str, delimiter: str) -> Iterator[tuple[int, list[Cell], str]]:
    """(number, cells, text) of each line that is not blank. An empty cell is None; a quoted empty cell is ""."""
    quoted = r'"([^"]*(?:""[^"]*)*)"'
    cell = re.compile(rf'(?:{quoted}|([^"{delimiter}\r\n][^{delimiter}\r\n]*)?)({delimiter}|\r\n|\r|\n|\Z)')
    position, start, number = 0, 0, 1
    cells: list[Cell] = []
    while True:
        match = cell.match(text, position)
        if match is None:
            closed = re.compile(quoted).match(text, position)
            raise parse_error(path, number, "Text after a closing quote" if closed else "A quote is not closed")
        inner, plain, end = match.groups()
        cells.append(plain if inner is None else inner.replace('""', '"'))
        position = match.end()
        if end != delimiter:
            line = text[start : match.start(3)]
            if line:
                yield number, cells, line
            if not end:
                return
            cells, start, number = [], position, number + 1


def parse_error(path: str, number: int, problem: str) -> OnecardError:
    return OnecardError(f"{path}: CSV parse error: Row #{number}: {problem}.")


def convert_cells(rows: Sequence[Mapping[str, Cell]]) -> list[dict[str, Any]]:
    """Convert the cells of the rows of one or more CSV files. A column's type depends on all of its cells."""
    columns: dict[str, list[Cell]] = {}
    for row in rows:
        for name, cell in row.items():
            columns.setdefault(name, []).append(cell)
    converters = {name: cell_converter(name, cells) for name, cells in columns.items()}
    return [{name: converters[name](cell) for name, cell in row.items()} for row in rows]


def cell_converter(name: str, cells: Sequence[Cell]) -> Callable[[Cell], Any]:
    """The function that converts a cell of this column to its value."""
    if name == "prompt":
        return lambda cell: cell or ""  # an empty prompt is text, not null
    if name in TEXT_COLUMNS:
        return lambda cell: cell
    if all(exact_number(cell) is not None for cell in cells if cell):
        return lambda cell: exact_number(cell) if cell else None
    if name in NUMBER_COLUMNS:
        return lambda cell: number_or_text(cell) if cell else None
    if name in BOOLEAN_COLUMNS:
        return lambda cell: BOOLEANS.get(cell.strip().lower(), cell) if cell else None
    return lambda cell: cell


def exact_number(cell: str) -> int | float | None:
    """The 64-bit int or float whose text is exactly the cell; None if there is none."""
    with suppress(ValueError):
        whole = int(cell)
        return whole if str(whole) == cell and -(2**63) <= whole < 2**63 else None
    with suppress(ValueError):
        value = float(cell)
        return value if str(value) == cell and math.isfinite(value) else None
    return None


def number_or_text(cell: str) -> float | str:
    """The cell as a float, in any notation; its text if it is not a number."""
    try:
        return cell if "_" in cell else float(cell)
    except ValueError:
        return cell
