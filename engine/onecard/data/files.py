"""From a file, a folder or a hub name to rows, each knowing the place it came from.

The readers are plain: nothing here knows what the columns mean. What can be wrong with a file as a whole is an
`OnecardError` at once, since no row can be skipped to mend it; what can be wrong with one row is for `examples.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.errors import OnecardError, nearest

# Read as text whatever they look like: a CSV of sums has answers such as `4`, which are no numbers to a tokenizer.
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Row:
    """One record. `number` is what a person would count, from 1.

    That is the line of a JSONL file, the row of a CSV file as a spreadsheet shows it (the header is row 1), and the
    position in everything else.
    """

    source: str
    number: int
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


Numbered = Iterator[tuple[int, Any]]


def load_rows(source: str, *, split: str) -> list[Row]:
    """All rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file, a dataset folder, or a hub dataset.

    `split` picks one of a dataset's splits; a file has none and takes no notice.
    """
    if not source:
        raise OnecardError("dataset: empty; expected a file, a folder or a Hugging Face dataset name.")
    path = Path(source).expanduser()
    if path.is_dir():
        numbered = read_folder(path, split)
    elif path.exists() or looks_like_file(source):
        numbered = read_file(path)
    else:
        numbered = read_hub(source, split)
    rows = []
    for number, values in numbered:
        if not isinstance(values, dict):
            raise OnecardError(f"{source}:{number}: expected an object, got {kind(values)}.")
        rows.append(Row(source, number, values))
    if not rows:
        raise OnecardError(f"{source}: no rows.")
    return rows


def prompt_rows(prompts: Sequence[str]) -> list[Row]:
    """Rows of the prompts that were given on the command line."""
    return [Row("--prompt", number, {"prompt": prompt}) for number, prompt in enumerate(prompts, start=1)]


def looks_like_file(source: str) -> bool:
    """A hub name is `name` or `owner/name`; only the owner's form may hold a dot."""
    if Path(source).suffix.lower() in READERS or source.startswith((".", "/", "~")):
        return True
    return source.count("/") > 1 or "\\" in source or ("/" not in source and Path(source).suffix[1:].isalpha())


def read_file(path: Path) -> Numbered:
    """Rows of one file, by its suffix."""
    if not path.exists():
        raise OnecardError(f"{path}: no such file.")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise OnecardError(
            f"{path}: unknown kind of file '{suffix}'; expected one of {', '.join(READERS)}.{nearest(suffix, READERS)}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OnecardError(f"{path}: cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise OnecardError(f"{path}: the file is empty.")
    return READERS[suffix](path, content)


def read_jsonl(path: Path, content: bytes) -> Numbered:
    """One object a line; blank lines are counted and passed over."""
    # Split by hand: `splitlines` would also cut at the separators that JSON allows inside a string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, parse(line, f"{path}:{number}")


def read_json(path: Path, content: bytes) -> Numbered:
    """A list of objects, or an object that holds one list of them."""
    try:
        document = parse(content.removeprefix(b"\xef\xbb\xbf"), str(path))
    except OnecardError as error:
        if "Extra data" in str(error):
            raise OnecardError(f"{error} If it holds one object a line, name it .jsonl.") from error
        raise
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    if not isinstance(document, list):
        raise OnecardError(f"{path}: expected a list of objects, or an object with one list; got {kind(document)}.")
    yield from enumerate(document, start=1)


def parse(text: bytes, place: str) -> Any:
    """JSON, with the place in the error."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise OnecardError(f"{place}: not UTF-8: {error.reason} at byte {error.start + 1}.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise OnecardError(f"{place}: not JSON: {error.msg.removesuffix(' at')} at {where}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise OnecardError(f"{place}: not JSON that can be read: {reason(error)}.") from error


def read_csv(path: Path, content: bytes) -> Numbered:
    """Comma-separated, with a header, quoted as spreadsheets do it."""
    import pyarrow
    import pyarrow.csv

    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(content),
            read_options=pyarrow.csv.ReadOptions(use_threads=False),  # with threads, errors do not name their row
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(TEXT_COLUMNS, pyarrow.string())),
        )
    except pyarrow.ArrowException as error:
        raise OnecardError(f"{path}: {reason(error)}.") from error
    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise OnecardError(f"{path}: the header names column '{twice}' twice.")
    return enumerate(table.to_pylist(), start=2)


def read_parquet(path: Path, content: bytes) -> Numbered:
    """Parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise OnecardError(f"{path}: not a Parquet file: {reason(error)}.") from error
    return enumerate(table.to_pylist(), start=1)


READERS: dict[str, Callable[[Path, bytes], Numbered]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_folder(path: Path, split: str) -> Numbered:
    """A folder that `save_to_disk` wrote, or one of data files."""
    import datasets

    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved:
        return read_hub(str(path), split)
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library's parsers raise
        raise OnecardError(f"{path}: cannot be loaded as a saved dataset: {reason(error)}.") from error
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise OnecardError(f"{path}: no split '{split}'; there are {', '.join(dataset)}.{nearest(split, dataset)}")
        dataset = dataset[split]
    return enumerate(dataset, start=1)


def read_hub(source: str, split: str) -> Numbered:
    """A dataset by the name that `datasets.load_dataset` knows it under."""
    import datasets

    try:
        dataset = datasets.load_dataset(source, split=split)
    except Exception as error:  # whatever the library, its parsers and the network raise
        raise OnecardError(
            f"{source}: no such file, nor a dataset with split '{split}' that can be loaded: {reason(error)}."
        ) from error
    return enumerate(dataset, start=1)


def reason(error: BaseException) -> str:
    """The first line of a library's message, without its full stop; the rest is advice about the library."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(". ")


KINDS = {"NoneType": "null", "str": "text", "bool": "true or false", "dict": "an object", "list": "a list"}


def kind(value: object) -> str:
    """What a value is, in the words of the file and not of Python."""
    name = type(value).__name__
    return "a number" if name in ("int", "float") else KINDS.get(name, name)
