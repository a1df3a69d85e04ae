"""Read one file as numbered records, by its suffix: JSON lines, JSON, CSV and Parquet, compressed or not.

rows.jsonl.gz -> bytes -> decompressed -> text (UTF-8, or UTF-16 and UTF-32 by their byte order mark) -> records
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from onecard.data.csv_table import read_table
from onecard.utils.errors import OnecardError, nearest

MESSAGE_COLUMNS = ("messages", "prompt", "completion", "completions", "chosen", "rejected")

NumberedRecords = Iterator[tuple[int, Any]]

COMPRESSED: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # suffix -> pyarrow's codec
SIGNATURES: Mapping[str, re.Pattern[bytes]] = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zip": re.compile(rb"PK\x03\x04"),
}
BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16: its mark begins with UTF-16's
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)


def suffixes(path: Path) -> tuple[str, str]:
    """The type of a file and its compression: (".jsonl", ".gz") for rows.jsonl.gz, (".csv", "") for rows.csv."""
    last = path.suffix.lower()
    if last not in COMPRESSED:
        return last, ""
    return Path(path.stem).suffix.lower(), last


def read_file(path: Path) -> NumberedRecords:
    """Yield (number, record) for each record of a file. The cells of a CSV file are text, or None if empty.

    Raises OnecardError if the file does not exist, is empty, or is not of the type that its suffix says.
    """
    if not path.exists():
        raise OnecardError(f"{path}: no such file.")
    suffix, compression = suffixes(path)
    if suffix not in READERS:
        suffix = suffix or compression
        raise OnecardError(
            f"{path}: unknown file type '{suffix}'; expected one of {', '.join(READERS)}, "
            f"or one of them followed by {', '.join(COMPRESSED)}.{nearest(suffix, READERS)}"
        )
    try:
        if READERS[suffix] is read_jsonl and not compression and is_utf8_readable(path):
            return stream_jsonl(path)
        content = path.read_bytes()
    except OSError as error:
        raise OnecardError(f"{path}: cannot be read: {error.strerror}.") from error
    if compression and content:
        check_signature(path, content, compression)
        content = decompressed(path, content, compression)
    if not content.strip():
        raise OnecardError(f"{path}: the file is empty.")
    check_signature(path, content, suffix)
    return READERS[suffix](path, content)


def check_signature(path: Path, content: bytes, suffix: str) -> None:
    """Raise OnecardError if a file is compressed or an archive, and its suffix does not say so."""
    detected = next((kind for kind, signature in SIGNATURES.items() if signature.match(content)), suffix)
    if detected != suffix:
        raise OnecardError(f"{path}: expected a {suffix} file, but its content is that of a {detected} file.")


def decompressed(path: Path, content: bytes, compression: str) -> bytes:
    """Decompress all frames of a file. Raises OnecardError if the file is truncated."""
    import pyarrow

    try:
        return bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(content), COMPRESSED[compression]).read())
    except (pyarrow.ArrowException, OSError) as error:
        raise OnecardError(f"{path}: cannot be decompressed as {compression}: {reason(error)}.") from error


def decode_text(path: Path, content: bytes) -> str:
    """Decode a file, without its byte order mark. Raises OnecardError with the location of an invalid byte."""
    mark, encoding = next((pair for pair in BYTE_ORDER_MARKS if content.startswith(pair[0])), (b"", "UTF-8"))
    if not mark and b"\0" in content[:4]:
        raise OnecardError(
            f"{path}: UTF-16 or UTF-32 without a byte order mark; expected UTF-8, or UTF-16 or UTF-32 with the mark."
        )
    content = content[len(mark) :]
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "UTF-8":
            raise OnecardError(f"{path}: not {encoding}: {error.reason} at byte {error.start + 1}.") from error
        line, byte = content.count(b"\n", 0, error.start) + 1, error.start - content.rfind(b"\n", 0, error.start)
        raise not_utf8(path, line, byte, error) from error


def not_utf8(path: Path, line: int, byte: int, error: UnicodeDecodeError) -> OnecardError:
    return OnecardError(
        f"{path}:{line}: not UTF-8: {error.reason} at byte {byte}. If it is Windows-1252 (Latin-1), "
        "`iconv -f WINDOWS-1252 -t UTF-8` converts it."
    )


def is_utf8_readable(path: Path) -> bool:
    """Whether a file may be UTF-8: it does not begin like UTF-16, UTF-32, a compressed file or an archive."""
    with open(path, "rb") as file:
        head = file.read(16)
    marks = [mark for mark, encoding in BYTE_ORDER_MARKS if encoding != "UTF-8"]
    return (
        not head.startswith(tuple(marks))
        and b"\0" not in head[:4]
        and not any(signature.match(head) for signature in SIGNATURES.values())
    )


def stream_jsonl(path: Path) -> NumberedRecords:
    """`read_jsonl` for a UTF-8 file, read line by line."""
    number, is_blank = 0, True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                is_blank = is_blank and not line.strip()
                text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("UTF-8")
                if text.strip():
                    yield number, parse(text, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise not_utf8(path, number, error.start + 1, error) from error
    except OSError as error:
        raise OnecardError(f"{path}: cannot be read: {error.strerror}.") from error
    if is_blank:
        raise OnecardError(f"{path}: the file is empty.")


def read_jsonl(path: Path, content: bytes) -> NumberedRecords:
    """One object per line. Blank lines are skipped; line numbers include them."""
    # Not `splitlines`: it also splits at separators that JSON allows inside a string.
    for number, line in enumerate(decode_text(path, content).split("\n"), start=1):
        if line.strip():
            yield number, parse(line, f"{path}:{number}")


def read_json(path: Path, content: bytes) -> NumberedRecords:
    """A list of objects, an object with one such list, a single row, or one object per line."""
    text = decode_text(path, content)
    first, _, rest = text.strip().partition("\n")
    if rest and is_object(first):
        yield from read_jsonl(path, content)
        return
    document = parse(text, str(path))
    if isinstance(document, dict) and not document.keys() & {*MESSAGE_COLUMNS, "text"}:
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    elif isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        raise OnecardError(
            f"{path}: expected a list of objects, or an object with one list; got {json_type(document)}."
        )
    yield from enumerate(document, start=1)


def is_object(line: str) -> bool:
    """Whether a line is a complete JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def parse(text: str, location: str) -> Any:
    """Parse JSON. Raises OnecardError with `location` and the line and column."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_float=parse_number)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise OnecardError(f"{location}: not JSON: {error.msg.removesuffix(' at')} at {where}.") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a duplicate key, thousands of digits, too deep nesting
        raise OnecardError(f"{location}: unsupported JSON: {reason(error)}.") from error


def parse_number(text: str) -> float | Decimal:
    """A JSON number as a float if that is exact, else as a Decimal: an answer may have more digits than a float."""
    value = float(text)
    return value if math.isinf(value) or Decimal(repr(value)) == Decimal(text) else Decimal(text)


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a duplicate key: JSON does not define which of its values is used."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return values


def read_csv(path: Path, content: bytes) -> NumberedRecords:
    """Comma-separated values with a header, quoted as in spreadsheets."""
    return read_table(str(path), decode_text(path, content), ",")


def read_tsv(path: Path, content: bytes) -> NumberedRecords:
    """Tab-separated values, otherwise like `read_csv`."""
    return read_table(str(path), decode_text(path, content), "\t")


def read_parquet(path: Path, content: bytes) -> NumberedRecords:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise OnecardError(f"{path}: not a Parquet file: {reason(error)}.") from error
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise OnecardError(f"{path}: column '{duplicate}' occurs twice.")

    def records() -> Iterator[Any]:
        try:  # use_threads=False: Arrow's threads may abort a process that exits soon after
            for batch in file.iter_batches(batch_size=1000, use_threads=False):
                yield from with_float64_columns(pyarrow.Table.from_batches([batch])).to_pylist()
        except OSError as error:
            raise OnecardError(f"{path}: not a Parquet file: {reason(error)}.") from error
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # invalid UTF-8, a date in the year 10000
            raise OnecardError(f"{path}: a value cannot be read: {reason(error)}.") from error

    return enumerate(records(), start=1)


def with_float64_columns(table: Any) -> Any:
    """Convert float16 and float32 columns to the float64 with the same decimal text: 0.1, not 0.10000000149."""
    import numpy as np
    import pyarrow

    for index, field in enumerate(table.schema):
        if field.type in (pyarrow.float16(), pyarrow.float32()):
            kind = np.float16 if field.type == pyarrow.float16() else np.float32
            values = [None if value is None else float(str(kind(value))) for value in table.column(index).to_pylist()]
            table = table.set_column(index, field.name, pyarrow.array(values, pyarrow.float64()))
    return table


READERS: dict[str, Callable[[Path, bytes], NumberedRecords]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


def reason(error: BaseException) -> str:
    """The first line of a library's message, at most 200 characters, without its full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(". ")


JSON_TYPES = {"NoneType": "null", "str": "text", "bool": "true or false", "dict": "an object", "list": "a list"}


def json_type(value: object) -> str:
    """The type of a value in the terms of JSON, not of Python."""
    if isinstance(value, float) and value != value:
        return "NaN"
    name = type(value).__name__
    return "a number" if name in ("int", "float", "Decimal") else JSON_TYPES.get(name, name)
