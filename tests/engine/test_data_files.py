"""`load_rows`: every kind of file gives the same rows, and every broken one a line that says where."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from onecard.data import Row, load_rows, prompt_rows
from onecard.data.typed_rows import PreferenceRow, preference_row
from onecard.utils.errors import OnecardError

REAL = Path(__file__).parents[2].parent / "shared" / "data"
RECORDS = [{"prompt": "2+2=", "chosen": "4"}, {"prompt": "a\nb, \u2028c", "chosen": "né"}]


def real(name: str) -> str:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    return str(path)


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def jsonl(records: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def parquet(folder: Path) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


CSV = 'prompt,chosen\n2+2=,4\n"a\nb, \u2028c",né\n'.encode()

SAME_ROWS = {  # how RECORDS may be written, and the numbers of the rows then
    "jsonl": ("rows.jsonl", jsonl(RECORDS), [1, 2]),
    "no line break at the end": ("rows.jsonl", jsonl(RECORDS).rstrip(), [1, 2]),
    "BOM, CRLF and blank lines": (
        "rows.JSONL",
        b"\xef\xbb\xbf\r\n" + jsonl(RECORDS, "\r\n\r\n") + b"\r\n \r\n",
        [2, 4],
    ),
    "json": ("rows.json", json.dumps(RECORDS).encode(), [1, 2]),
    "json with BOM": ("rows.json", b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=1).encode(), [1, 2]),
    "json, one list in an object": ("rows.json", json.dumps({"version": 1, "data": RECORDS}).encode(), [1, 2]),
    "csv": ("rows.csv", CSV, [2, 3]),
    "csv with BOM and blank lines": ("rows.csv", b"\xef\xbb\xbf" + CSV + b"\n\n", [2, 3]),
    "csv with a blank line between": ("rows.csv", CSV.replace(b"4\n", b"4\n\r\n"), [2, 4]),
    "tsv": ("rows.tsv", CSV.replace(b",chosen", b"\tchosen").replace(b",4", b"\t4").replace(b",n", b"\tn"), [2, 3]),
    "ndjson": ("rows.ndjson", jsonl(RECORDS), [1, 2]),
    "json, one object a line": ("rows.json", b"\n" + jsonl(RECORDS), [2, 3]),
    "jsonl.gz": ("rows.jsonl.gz", gzip.compress(jsonl(RECORDS)), [1, 2]),
    "jsonl.gz of two parts": ("rows.jsonl.GZ", b"".join(gzip.compress(jsonl([one])) for one in RECORDS), [1, 2]),
    "csv.zst": ("rows.csv.zst", zstd(CSV), [2, 3]),
    "csv.zst of two parts": ("rows.csv.zst", zstd(CSV[:20]) + zstd(CSV[20:]), [2, 3]),
    "json.gz": ("rows.json.gz", gzip.compress(json.dumps(RECORDS).encode()), [1, 2]),
    "json.bz2": ("rows.json.bz2", bz2.compress(json.dumps(RECORDS).encode()), [1, 2]),
    **{
        f"{name} in {encoding}": (f"rows.{name}", mark + text.decode().encode(encoding), numbers)
        for name, text, numbers in (
            ("jsonl", jsonl(RECORDS), [1, 2]),
            ("json", json.dumps(RECORDS).encode(), [1, 2]),
            ("csv", CSV, [2, 3]),
        )
        for encoding, mark in (
            ("utf-8", b"\xef\xbb\xbf"),
            ("utf-16-le", b"\xff\xfe"),
            ("utf-16-be", b"\xfe\xff"),
            ("utf-32-le", b"\xff\xfe\0\0"),
        )
    },
    "UTF-16 in a compressed file": ("rows.csv.gz", gzip.compress(CSV.decode().encode("utf-16")), [2, 3]),
}


@pytest.mark.parametrize(("name", "content", "numbers"), SAME_ROWS.values(), ids=SAME_ROWS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes, numbers: list[int]) -> None:
    path = write(tmp_path, name, content)
    rows = [Row(path, number, record) for number, record in zip(numbers, RECORDS, strict=True)]
    assert load_rows(path, split="train") == rows


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    assert load_rows(path, split="any") == [Row(path, 1, RECORDS[0]), Row(path, 2, RECORDS[1])]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
def test_parquet_may_be_compressed_as_a_whole(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path, f"rows.parquet{suffix}", compress(Path(parquet(tmp_path)).read_bytes()))
    assert [row.values for row in load_rows(path, split="any")] == RECORDS


def test_parquet_types_that_texts_come_in(tmp_path: Path) -> None:
    texts = ["a", None]
    table = pyarrow.table({
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "category": pyarrow.array(texts).dictionary_encode(),
        "view": pyarrow.array(texts, pyarrow.string_view()),
        "big": pyarrow.array([2**64 - 1, None], pyarrow.uint64()),
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    first, second = (row.values for row in load_rows(str(tmp_path / "x.parquet"), split="any"))
    assert first == {"large": "a", "category": "a", "view": "a", "big": 2**64 - 1}
    assert set(second.values()) == {None}


def test_reading_parquet_starts_no_threads(tmp_path: Path) -> None:
    """A process that ends while Arrow's threads are at work is aborted, and its exit code is lost."""
    if not Path("/proc/self/task").exists():
        pytest.skip("threads cannot be counted here")
    script = f"""
import os, pyarrow.parquet
from onecard.data import load_rows
before = os.listdir("/proc/self/task")
load_rows({parquet(tmp_path)!r}, split="train")
assert len(os.listdir("/proc/self/task")) == len(before)
"""
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": ":".join(sys.path)}, check=True)


def test_a_parquet_column_of_null_is_as_absent_as_in_jsonl(tmp_path: Path) -> None:
    """`margin`, and the prompt beside chat pairs: what one row has, Parquet gives all of them."""
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))]
    question, chosen, rejected = ([turn] for turn in turns)
    records = [
        {"prompt": question, "chosen": chosen, "rejected": rejected, "margin": 0.5},
        {"chosen": question + chosen, "rejected": question + rejected},
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(records, schema=pyarrow.Table.from_pylist(records[:1]).schema), tmp_path / "x.parquet"
    )
    [first, second] = load_rows(str(tmp_path / "x.parquet"), split="train")
    assert second.values["prompt"] is second.values["margin"] is None
    assert preference_row(first) == PreferenceRow(tuple(question), tuple(chosen), tuple(rejected), 0.5)
    assert preference_row(second) == preference_row(Row("x", 2, records[1]))
    assert preference_row(second) == PreferenceRow(tuple(question), tuple(chosen), tuple(rejected), 0.0)


KNOWN_FILES = "expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, or one of them followed by .gz, .zst, .bz2"
BAD_FILES = {
    "not json": ("x.jsonl", b'{"a": 1}\n\n{"a": }\n', "x.jsonl:3: not JSON: Expecting value at column 7."),
    "cut off": ("x.jsonl", b'{"a": 1}\n{"a": "b', "x.jsonl:2: not JSON: Unterminated string starting at column 7."),
    "not an object": ("x.jsonl", b'{"a": 1}\n[1, 2]\n', "x.jsonl:2: expected an object, got a list."),
    "null line": ("x.jsonl", b'{"a": 1}\nnull\n', "x.jsonl:2: expected an object, got null."),
    "latin-1": (
        "x.jsonl",
        b'{"a": 1}\n{"a": "\xe9"}\n',
        "x.jsonl:2: not UTF-8: invalid continuation byte at byte 8. If it is Windows-1252 (Latin-1), "
        "`iconv -f WINDOWS-1252 -t UTF-8` converts it.",
    ),
    "key twice": (
        "x.jsonl",
        b'{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n',
        "x.jsonl:2: unsupported JSON: key 'c' occurs twice.",
    ),
    "UTF-16 without a mark": (
        "x.csv",
        "prompt\na\n".encode("utf-16-le"),
        "x.csv: UTF-16 or UTF-32 without a byte order mark; expected UTF-8, or UTF-16 or UTF-32 with the mark.",
    ),
    "UTF-16 cut off": ("x.csv", b"\xff\xfep\0\n\0a", "x.csv: not UTF-16-LE: truncated data at byte 5."),
    "not gzip": (
        "x.jsonl.gz",
        b'{"a": 1}\n',
        "x.jsonl.gz: cannot be decompressed as .gz: zlib inflate failed: incorrect header check.",
    ),
    "gzip cut off": (
        "x.csv.gz",
        gzip.compress(CSV)[:-5],
        "x.csv.gz: cannot be decompressed as .gz: Truncated compressed stream.",
    ),
    "zstd cut off": (
        "x.csv.zst",
        zstd(CSV * 9)[:-5],
        "x.csv.zst: cannot be decompressed as .zst: Truncated compressed stream.",
    ),
    "gzip of nothing": ("x.jsonl.gz", gzip.compress(b"\n"), "x.jsonl.gz: the file is empty."),
    "empty .gz": ("x.jsonl.gz", b"", "x.jsonl.gz: the file is empty."),
    "zstd named .gz": (
        "x.csv.gz",
        zstd(CSV),
        "x.csv.gz: expected a .gz file, but its content is that of a .zst file.",
    ),
    "gzip without the name": (
        "x.csv",
        gzip.compress(CSV),
        "x.csv: expected a .csv file, but its content is that of a .gz file.",
    ),
    "zstd without the name": (
        "x.jsonl",
        zstd(jsonl(RECORDS)),
        "x.jsonl: expected a .jsonl file, but its content is that of a .zst file.",
    ),
    "gzip twice": (
        "x.csv.gz",
        gzip.compress(gzip.compress(CSV)),
        "x.csv.gz: expected a .csv file, but its content is that of a .gz file.",
    ),
    "spreadsheet": (
        "x.csv",
        b"PK\x03\x04rest",
        "x.csv: expected a .csv file, but its content is that of a .zip file.",
    ),
    "endless nesting": ("x.jsonl", b"[" * 100_000, None),
    "empty": ("x.jsonl", b"", "x.jsonl: the file is empty."),
    "blank": ("x.csv", b"\n \n", "x.csv: the file is empty."),
    "BOM only": ("x.jsonl", b"\xef\xbb\xbf\n", "x.jsonl: no rows."),
    "broken json": ("x.json", b'[\n{"a" 1}]', "x.json: not JSON: Expecting ':' delimiter at line 2 column 6."),
    "lines in .json": ("x.json", b'{"a": 1}\n{"a": }\n', "x.json:2: not JSON: Expecting value at column 7."),
    "two lists in .json": ("x.json", b"[]\n[]\n", "x.json: not JSON: Extra data at line 2 column 1."),
    "text in json": ("x.json", b'"a"', "x.json: expected a list of objects, or an object with one list; got text."),
    "two lists": (
        "x.json",
        b'{"a": [], "b": []}',
        "x.json: expected a list of objects, or an object with one list; got an object.",
    ),
    "number in json": ("x.json", b'[{"a": 1}, 3]', "x.json:2: expected an object, got a number."),
    "empty json": ("x.json", b"[]", "x.json: no rows."),
    "header only": ("x.csv", b"prompt,chosen\n", "x.csv: no rows."),
    "too many cells": (
        "x.csv",
        b"prompt,chosen\na,b\nc,d,e\n",
        "x.csv: CSV parse error: Row #3: Expected 2 columns, got 3: c,d,e.",
    ),
    "too few cells": (
        "x.csv",
        b'prompt,chosen\n\n"a\n\nb",b\nc\n',
        "x.csv: CSV parse error: Row #4: Expected 2 columns, got 1: c.",
    ),
    "quote never closed": ("x.csv", b'a,b\nc,"d\ne,f\n', "x.csv: CSV parse error: Row #2: A quote is not closed."),
    "quote closed too soon": (
        "x.tsv",
        b'a\tb\n"c" d\te\n',
        "x.tsv: CSV parse error: Row #2: Text after a closing quote.",
    ),
    "csv in latin-1": (
        "x.csv",
        b"prompt\na\n\xe9\n",
        "x.csv:3: not UTF-8: invalid continuation byte at byte 1. If it is Windows-1252 (Latin-1), "
        "`iconv -f WINDOWS-1252 -t UTF-8` converts it.",
    ),
    "column twice": ("x.csv", b"prompt,prompt\na,b\n", "x.csv: the header names column 'prompt' twice."),
    "not parquet": ("x.parquet", b"PAR", None),
    "unknown suffix": (
        "x.jsonlines",
        b"{}",
        "x.jsonlines: unknown file type '.jsonlines'; expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, "
        "or one of them followed by .gz, .zst, .bz2. Did you mean '.jsonl'?",
    ),
    "no suffix": ("x", b"{}", f"x: unknown file type ''; {KNOWN_FILES}."),
    "only compressed": ("x.gz", b"{}", f"x.gz: unknown file type '.gz'; {KNOWN_FILES}."),
    "archive": ("x.csv.zip", b"{}", f"x.csv.zip: unknown file type '.zip'; {KNOWN_FILES}."),
    "unknown suffix, compressed": ("x.txt.zst", b"{}", f"x.txt.zst: unknown file type '.txt'; {KNOWN_FILES}."),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_broken_files_say_where_and_why(tmp_path: Path, name: str, content: bytes, message: str | None) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(OnecardError) as error:
        load_rows(path, split="train")
    if message is None:  # the reason is the reader library's own
        assert str(error.value).startswith(path)
        assert "\n" not in str(error.value)
    else:
        assert str(error.value) == f"{tmp_path}/{message}"


@pytest.mark.parametrize("source", ["pairs.jsonl", "./pairs", "/nowhere/at/all", "a/b/c", "notes.txt", "a/b.gz"])
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(OnecardError, match=r": no such file\.$"):
        load_rows(source, split="train")


def test_hub_names_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("owner/pairs.v2", split="test[:2]") == [
        Row("owner/pairs.v2", 1, RECORDS[0]),
        Row("owner/pairs.v2", 2, RECORDS[1]),
    ]
    assert asked == [("owner/pairs.v2", "test[:2]")]


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *, split: str) -> datasets.Dataset:
        raise ValueError('Unknown split "tset". Should be one of ["test"].\nAdvice.\n')

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(OnecardError) as error:
        load_rows("owner/pairs", split="tset")
    assert str(error.value) == (
        "owner/pairs: not a file, and split 'tset' of a dataset with this name cannot be loaded: "
        'Unknown split "tset". Should be one of ["test"].'
    )


def test_saved_folders_with_and_without_splits(tmp_path: Path) -> None:
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    datasets.Dataset.from_list(RECORDS).save_to_disk(one)
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(several)
    assert [row.values for row in load_rows(one, split="anything")] == RECORDS
    assert load_rows(several, split="train")[1] == Row(several, 2, RECORDS[1])
    with pytest.raises(OnecardError) as error:
        load_rows(several, split="trian")
    assert str(error.value) == f"{several}: no split 'trian'; there are train. Did you mean 'train'?"


def test_rows_say_their_place() -> None:
    assert [str(row) for row in prompt_rows(["a", "b"])] == ["--prompt:1", "--prompt:2"]


@pytest.mark.parametrize(
    ("name", "count", "columns", "last"),
    [
        ("prefs/rasbt_politeness.jsonl", 1094, ["prompt", "chosen", "rejected", "reference"], 1094),
        ("prefs/pandalm_human.jsonl", 836, ["prompt", "chosen", "rejected", "votes"], 836),
        ("text/tinystories.jsonl", 187, ["text", "source"], 187),
        ("sentiment/openai_dev_binary_sent.csv", 872, ["label", "sentence"], 873),
    ],
)
def test_real_files(name: str, count: int, columns: list[str], last: int) -> None:
    rows = load_rows(real(name), split="train")
    assert (len(rows), list(rows[0].values), rows[-1].number) == (count, columns, last)
