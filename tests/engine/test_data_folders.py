"""A folder of data files: each is read as it is alone, and its name says its split as it does for `datasets`."""

from __future__ import annotations

import gzip
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from onecard.data import load_rows
from onecard.data.splits import data_files, files_by_split
from onecard.utils.errors import OnecardError


def fill(folder: Path, *names: str) -> str:
    """Files with one row each, which holds the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        record = f'{{"prompt": "{name}"}}\n'.encode()
        table = f"prompt\n{name}\n".encode()
        content = {".csv": table, ".tsv": table, ".json": b"[" + record + b"]", ".gz": gzip.compress(record)}
        path.write_bytes(content.get(path.suffix, record))
    return str(folder)


def prompts(source: str, split: str = "train") -> list[str]:
    return [row.values["prompt"] for row in load_rows(source, split=split)]


LAYOUTS = [
    ["b.csv", "a.csv"],
    ["a10.csv", "a2.csv", "B.csv", "sub/z.csv"],
    ["train.csv", "test.csv", "more.csv"],
    ["train_1.csv", "my-train.csv", "training 2.csv", "trainer.csv", "mytrain.csv"],
    ["dev.csv", "x.val.csv", "valid0.csv", "evaluation.csv", "testing.csv"],
    ["Train.csv", "TEST.csv"],
    ["train/a.csv", "test/a.csv", "train.csv"],
    ["train/test.csv", "train/deep/b.csv"],
    ["all/my_train/a.csv", "all/eval-2/a.csv"],
    ["train/train-0/a.csv", "train/b.csv"],
    ["train_test.csv"],
    ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/odd-00000-of-00001.csv", "test.csv"],
    [".hidden.csv", "a.csv", ".git/b.csv", "__cache/c.csv", "__d.csv"],
]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_splits_are_those_that_datasets_finds(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "rows"
    fill(folder, *names)
    files = data_files(folder, [".csv"])
    found = files_by_split(files) or {"train": files}
    expected = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path)).config.data_files
    assert {split: {str(folder / file) for file in files} for split, files in found.items()} == {
        str(split): set(files) for split, files in expected.items()
    }


def test_files_of_every_kind_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = fill(
        tmp_path, "c.json", "b/a.jsonl", "a.jsonl.gz", "d.tsv", "e.csv", "README.md", "LICENSE", "config.json"
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["f.parquet"]}), tmp_path / "f.parquet")
    rows = load_rows(source, split="train")
    names = ["a.jsonl.gz", "b/a.jsonl", "c.json", "d.tsv", "e.csv", "f.parquet"]
    assert [row.values["prompt"] for row in rows] == names
    assert [str(row) for row in rows] == [f"{source}/{name}:{1 + (name in ('d.tsv', 'e.csv'))}" for name in names]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["train/a.csv", "train/b.csv"]),
        ("test", ["test/c.csv"]),
        ("train[1:]", ["train/b.csv"]),
        ("train[:50%]+test", ["train/a.csv", "test/c.csv"]),
        ("test+train", ["test/c.csv", "train/a.csv", "train/b.csv"]),
        ("all", ["test/c.csv", "train/a.csv", "train/b.csv"]),
    ],
)
def test_parts_of_splits(tmp_path: Path, split: str, expected: list[str]) -> None:
    assert prompts(fill(tmp_path, "train/a.csv", "train/b.csv", "test/c.csv"), split) == expected


def test_a_folder_without_splits_is_like_a_file(tmp_path: Path) -> None:
    source = fill(tmp_path, "a.csv", "b.jsonl")
    assert prompts(source, "train") == prompts(source, "test") == ["a.csv", "b.jsonl"]
    assert prompts(source, "train[:1]") == ["a.csv"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian", "no split 'trian'; there are test, train. Did you mean 'train'?"),
        ("validation", "no split 'validation'; there are test, train."),
        ("dev[:3]", "split 'dev[:3]': Unknown split \"dev\". Should be one of ['test', 'train']."),
        ("train[a:b]", "split 'train[a:b]': Unrecognized instruction format: train[a:b]."),
    ],
)
def test_splits_that_are_not_there(tmp_path: Path, split: str, message: str) -> None:
    source = fill(tmp_path, "train/a.csv", "test/c.csv")
    with pytest.raises(OnecardError) as error:
        load_rows(source, split=split)
    assert str(error.value) == f"{source}: {message}"


def test_all_csv_files_decide_what_a_column_is(tmp_path: Path) -> None:
    for name, cell in (("a.csv", "5"), ("b.csv", "02134"), ("c.jsonl", '{"code": 5, "weight": "1"}')):
        (tmp_path / name).write_text(cell if name == "c.jsonl" else f"code,weight\n{cell},1\n")
    rows = [row.values for row in load_rows(str(tmp_path), split="train")]
    assert rows == [{"code": "5", "weight": 1}, {"code": "02134", "weight": 1}, {"code": 5, "weight": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.csv", b"prompt\na,b\n", "b.csv: CSV parse error: Row #2: Expected 1 columns, got 2: a,b."),
        ("b.csv", b"", "b.csv: the file is empty."),
        ("b.jsonl", b'{"a": 1}\n[]\n', "b.jsonl:2: expected an object, got a list."),
        ("b.csv", b"prompt\n\xe9\n", "b.csv:2: not UTF-8: invalid continuation byte at byte 1."),
        ("b.csv.gz", b"prompt\n", "b.csv.gz: cannot be decompressed as .gz: "),
        ("b.csv.zip", b"", "b.csv.zip: unknown file type '.zip'; "),
        ("b.tar.gz", b"", "b.tar.gz: unknown file type '.tar'; "),
        ("b.tar", b"", "b.tar: unknown file type '.tar'; "),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    source = fill(tmp_path, "a.csv")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OnecardError) as error:
        load_rows(source, split="train")
    assert str(error.value).startswith(f"{source}/{message}")


CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n# Rows\n"


@pytest.mark.parametrize(
    ("files", "ours"),
    [
        ({"README.md": CARD}, False),
        ({"README.md": CARD.replace("configs", "dataset_info")}, False),
        ({"README.md": CARD.replace("configs", "tags")}, True),
        ({"README.md": "---\nlicense: mit\n---\nconfigs: none\n---\n"}, True),
        ({"README.md": "# Rows\n\n---\nconfigs: none\n---\n"}, True),
        ({"dataset_infos.json": "{}"}, False),
        ({"notes.txt": "a", "rows.py": "1"}, True),
    ],
)
def test_a_folder_with_settings_of_its_own_is_left_to_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], ours: bool
) -> None:
    source = fill(tmp_path, "a.csv")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    theirs = datasets.Dataset.from_list([{"prompt": "theirs"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: theirs)
    assert prompts(source) == ["a.csv" if ours else "theirs"]


def test_a_folder_without_files_to_read_is_left_to_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"prompt": "theirs"}]))
    assert prompts(str(tmp_path)) == ["theirs"]
