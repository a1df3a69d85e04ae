"""Open a file, a folder or a hub dataset as rows, each with its source (such as a file name) and number.

An error in a file as a whole raises an `OnecardError` at once, because skipping rows would not help. Errors in single
rows are handled in `examples.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from onecard.data.columns import TEMPLATE_COLUMNS
from onecard.data.csv_table import convert_cells
from onecard.data.readers import (
    COMPRESSED,
    MESSAGE_COLUMNS,
    READERS,
    NumberedRecords,
    json_type,
    read_csv,
    read_file,
    read_jsonl,
    read_parquet,
    read_tsv,
    reason,
    suffixes,
)
from onecard.data.splits import data_files, files_by_split, has_loading_config
from onecard.utils.errors import OnecardError, nearest
from onecard.utils.files import blocks, digest

# Not supported: a folder of data files that has such a file raises an error.
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".xz", ".lz4")
NESTED_COLUMNS = (*MESSAGE_COLUMNS, *TEMPLATE_COLUMNS)
# Data of this size or larger is not kept in memory, and its tokens are cached.
LARGE_BYTES, LARGE_ROWS = 1 << 24, 20_000
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class Row:
    """One record, and where it is from.

    `number`: the line of a JSONL file, the row of a CSV file as a spreadsheet shows it (the header is row 1), otherwise
    the position in the file. It counts from 1.
    """

    source: str
    number: int
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


@dataclass(frozen=True)
class Rows(Iterable[Row]):
    """Rows that are read again in each iteration. `total`: their number, if known.

    `identity` is a string that changes when the rows do. It is empty for small data, and for rows without a digest
    or fingerprint.
    """

    read: Callable[[], Iterator[Row]]
    total: int | None = None
    identity: str = ""

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def load_rows(source: str, *, split: str) -> list[Row]:
    """The rows of `open_rows` as a list."""
    return list(open_rows(source, split=split))


def open_rows(source: str, *, split: str) -> Rows:
    """Open a file (`readers.READERS` has the types), a folder of files, a saved dataset, or a hub dataset.

    `split` selects a split of a dataset. It is ignored for a file, and for a folder without splits. Raises OnecardError
    if the source cannot be read; the iterator raises it if there are no rows.
    """
    if not source:
        raise OnecardError("dataset: empty; expected a file, a folder or a Hugging Face dataset name.")
    path = Path(source).expanduser()
    if path.is_file() and "[" in split:
        raise OnecardError(f"{source}: split '{split}': a file has no splits to slice; expected a name without '['.")
    if path.is_dir():
        rows = open_folder(source, path, split)
    elif path.exists() or looks_like_file(source):
        rows = open_files({source: path})
    else:
        rows = dataset_rows(source, load_hub(source, split))

    def read() -> Iterator[Row]:
        is_empty = True
        for row in rows:
            is_empty = False
            yield row
        if is_empty:
            raise OnecardError(f"{source}: no rows.")

    return replace(rows, read=read)


def dataset_rows(source: str, dataset: Any) -> Rows:
    """Rows of a `datasets.Dataset` or `IterableDataset`."""
    total = len(dataset) if isinstance(dataset, Sized) else None
    large = total is not None and total >= LARGE_ROWS
    return Rows(
        lambda: rows_from_records(source, enumerate(dataset, start=1), tabular=True),
        total,
        f"{source} {dataset._fingerprint}" if large else "",
    )


def in_memory(rows: Sequence[Row]) -> Rows:
    """`Rows` of a list in memory."""
    return Rows(lambda: iter(rows), len(rows))


def with_check(rows: Iterable[Row], check: Callable[[Row], None]) -> Rows:
    """The same rows. `check` is called with each when it is read, and may raise."""

    def read() -> Iterator[Row]:
        for row in rows:
            check(row)
            yield row

    if not isinstance(rows, Rows):
        return Rows(read)
    return replace(rows, read=read, identity=rows.identity and f"{rows.identity}, checked")


def prompt_rows(prompts: Sequence[str]) -> list[Row]:
    """Rows of prompts from the command line (`--prompt`)."""
    return [Row("--prompt", number, {"prompt": prompt}) for number, prompt in enumerate(prompts, start=1)]


def looks_like_file(source: str) -> bool:
    """Whether `source` is a path. A hub name is `name` or `owner/name`; only `owner/name` may have a dot."""
    if Path(source).suffix.lower() in (*READERS, *COMPRESSED) or source.startswith((".", "/", "~")):
        return True
    return source.count("/") > 1 or "\\" in source or ("/" not in source and Path(source).suffix[1:].isalpha())


def rows_from_records(source: str, records: NumberedRecords, *, tabular: bool = False) -> Iterator[Row]:
    """Rows of (number, object) records. `tabular`: nulls in messages may stand for missing keys, and are removed.

    Raises OnecardError for a record that is not an object.
    """
    for number, values in records:
        if not isinstance(values, dict):
            raise OnecardError(f"{source}:{number}: expected an object, got {json_type(values)}.")
        yield Row(source, number, without_added_nulls(values) if tabular else values)


def without_added_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A row without null keys in its messages and tools, at any depth.

    Arrow gives all objects of a column the same keys, and fills in nulls.
    """
    return {name: without_nulls(value) if name in NESTED_COLUMNS else value for name, value in values.items()}


def without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def open_files(files: Mapping[str, Path]) -> Rows:
    """Rows of files (name -> path), one file after the other. The names are the rows' sources."""
    readers = {name: READERS.get(suffixes(path)[0]) for name, path in files.items()}
    tables = {name for name, reader in readers.items() if reader in (read_csv, read_tsv)}

    def read() -> Iterator[Row]:
        for name, path in files.items():
            yield from rows_from_records(name, read_file(path), tabular=readers[name] is read_parquet)

    def read_with_tables() -> Iterator[Row]:
        rows = list(read())  # a column's type depends on all of its cells
        table_values = iter(convert_cells([row.values for row in rows if row.source in tables]))
        return (replace(row, values=next(table_values)) if row.source in tables else row for row in rows)

    reader = read_with_tables if tables else read
    if sum(path.stat().st_size for path in files.values() if path.is_file()) < LARGE_BYTES:
        return in_memory(list(reader()))
    return Rows(reader, count_rows(files), " ".join(f"{name} {digest(path)}" for name, path in files.items()))


def count_rows(files: Mapping[str, Path]) -> int | None:
    """The number of lines of JSONL files, which is about the number of rows; None for other types."""
    if not all(READERS.get(path.suffix.lower()) is read_jsonl for path in files.values()):
        return None
    return sum(block.count(b"\n") for path in files.values() for block in blocks(path))


def open_folder(source: str, path: Path, split: str) -> Rows:
    """Rows of a folder: one that `save_to_disk` wrote, or one of data files. Other folders are loaded by `datasets`."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return dataset_rows(source, load_saved(path, split))
    compressed = (suffix + compression for suffix in READERS for compression in COMPRESSED)
    files = data_files(path, (*READERS, *compressed, *ARCHIVES))
    if has_loading_config(path) or not any(suffixes(Path(file))[0] in READERS for file in files):
        return dataset_rows(source, load_hub(str(path), split))

    def open_selected(selected: Sequence[PurePosixPath]) -> Rows:
        return open_files({str(Path(source) / file): path / file for file in selected})

    splits = files_by_split(files)
    if split in splits:
        return open_selected(splits[split])
    if SPLIT_NAME.fullmatch(split) and split != "all":
        if splits:
            raise OnecardError(f"{source}: no split '{split}'; there are {', '.join(splits)}.{nearest(split, splits)}")
        return open_selected(files)
    parts = {name: list(open_selected(selected)) for name, selected in (splits or {"train": files}).items()}
    return in_memory(select_split(source, split, parts))


def select_split(source: str, split: str, splits: Mapping[str, list[Row]]) -> list[Row]:
    """The rows of a split expression such as `train[:100]+test[50%:]`, parsed by `datasets`. `splits`: name -> rows."""
    import datasets

    spec = "+".join(splits) if split == "all" else split
    try:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise OnecardError(f"{source}: split '{split}': {reason(error)}.") from error
    return [row for part in parts for row in splits[part.splitname][part.from_ : part.to]]


def load_saved(path: Path, split: str) -> Any:
    """Load a split of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the library's parsers may raise anything
        raise OnecardError(f"{path}: cannot be loaded as a saved dataset: {reason(error)}.") from error
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise OnecardError(f"{path}: no split '{split}'; there are {', '.join(dataset)}.{nearest(split, dataset)}")
        dataset = dataset[split]
    elif "[" in split:
        raise OnecardError(f"{path}: split '{split}': the dataset has no splits to slice; expected a name without '['.")
    return dataset


def load_hub(source: str, split: str) -> Any:
    """Load a split of a dataset with `datasets.load_dataset`. `source`: a hub name, or a folder."""
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the library, its parsers and the network may raise anything
        raise OnecardError(
            f"{source}: not a file, and split '{split}' of a dataset with this name cannot be loaded: {reason(error)}."
        ) from error
