"""`load_rows`: every kind of file gives the same rows, and every broken one a line that says where."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from onecard.data import Row, load_rows, prompt_rows
from onecard.data.examples import PreferenceRow, preference_row
from onecard.errors import OnecardError

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
}


@pytest.mark.parametrize(("name", "content", "numbers"), SAME_ROWS.values(), ids=SAME_ROWS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes, numbers: list[int]) -> None:
    path = write(tmp_path, name, content)
    rows = [Row(path, number, record) for number, record in zip(numbers, RECORDS, strict=True)]
    assert load_rows(path, split="train") == rows


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    assert load_rows(path, split="any") == [Row(path, 1, RECORDS[0]), Row(path, 2, RECORDS[1])]


def test_a_column_that_parquet_fills_with_null_is_as_absent_as_in_jsonl(tmp_path: Path) -> None:
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


def test_csv_keeps_text_columns_as_text_and_reads_numbers_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", b"prompt,chosen,margin\r\n1,NA,0.5\r\n,007,2\r\n")
    assert [row.values for row in load_rows(path, split="train")] == [
        {"prompt": "1", "chosen": "NA", "margin": 0.5},
        {"prompt": "", "chosen": "007", "margin": 2.0},
    ]


def test_csv_longer_than_one_block_of_the_reader_may_have_line_breaks_in_quotes(tmp_path: Path) -> None:
    value = "a line\n" * 300
    path = write(tmp_path, "rows.csv", ("prompt,number\n" + f'"{value}",7\n' * 2000).encode())
    rows = load_rows(path, split="train")
    assert {row.values["prompt"] for row in rows} == {value}
    assert rows[-1].number == 2001


BAD_FILES = {
    "not json": ("x.jsonl", b'{"a": 1}\n\n{"a": }\n', "x.jsonl:3: not JSON: Expecting value at column 7."),
    "cut off": ("x.jsonl", b'{"a": 1}\n{"a": "b', "x.jsonl:2: not JSON: Unterminated string starting at column 7."),
    "not an object": ("x.jsonl", b'{"a": 1}\n[1, 2]\n', "x.jsonl:2: expected an object, got a list."),
    "null line": ("x.jsonl", b'{"a": 1}\nnull\n', "x.jsonl:2: expected an object, got null."),
    "latin-1": ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "x.jsonl:2: not UTF-8: invalid continuation byte at byte 8."),
    "endless nesting": ("x.jsonl", b"[" * 100_000, None),
    "empty": ("x.jsonl", b"", "x.jsonl: the file is empty."),
    "blank": ("x.csv", b"\n \n", "x.csv: the file is empty."),
    "BOM only": ("x.jsonl", b"\xef\xbb\xbf\n", "x.jsonl: no rows."),
    "broken json": ("x.json", b'[\n{"a" 1}]', "x.json: not JSON: Expecting ':' delimiter at line 2 column 6."),
    "lines in .json": (
        "x.json",
        b'{"a": 1}\n{"a": 2}\n',
        "x.json: not JSON: Extra data at line 2 column 1. If it holds one object a line, name it .jsonl.",
    ),
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
    "csv in latin-1": ("x.csv", b"prompt\n\xe9\n", None),
    "column twice": ("x.csv", b"prompt,prompt\na,b\n", "x.csv: the header names column 'prompt' twice."),
    "not parquet": ("x.parquet", b"PAR", None),
    "unknown suffix": (
        "x.jsonlines",
        b"{}",
        "x.jsonlines: unknown kind of file '.jsonlines'; expected one of .jsonl, .json, .csv, .parquet. "
        "Did you mean '.jsonl'?",
    ),
    "no suffix": ("x", b"{}", "x: unknown kind of file ''; expected one of .jsonl, .json, .csv, .parquet."),
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


@pytest.mark.parametrize("source", ["pairs.jsonl", "./pairs", "/nowhere/at/all", "a/b/c", "notes.txt"])
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
        "owner/pairs: no such file, nor a dataset with split 'tset' that can be loaded: "
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
