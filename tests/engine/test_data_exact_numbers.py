"""Numbers of data files as they are written."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from onecard.data import load_rows
from onecard.rewards.builtin import expected_text, says
from onecard.utils.errors import OnecardError


def values(path: Path, name: str) -> list[object]:
    return [row.values[name] for row in load_rows(str(path), split="train")]


@pytest.mark.parametrize(
    ("text", "answer", "other"),
    [
        ("3.14159265358979323846", "3.14159265358979323846", "3.141592653589793"),
        ("0.1234567890123456789", "0.1234567890123456789", "0.12345678901234568"),
        ("1e-400", "1e-400", "0"),
        ("0.1", "0.1", "0.10000000000000001"),
        ("1e3", "1000", "3"),
        ("-5", "\u22125", "5"),
    ],
)
def test_a_number_that_is_an_answer_keeps_its_digits(tmp_path, text, answer, other):
    (tmp_path / "x.jsonl").write_text(f'{{"prompt": "a", "answer": {text}}}\n')
    (found,) = values(tmp_path / "x.jsonl", "answer")
    expected = expected_text(found, "answer", "a")
    assert says(f"it is {answer}", expected)
    assert not says(f"it is {other}", expected)
    assert isinstance(found, int | float | Decimal)


@pytest.mark.parametrize("expected", ["1e5", "2.5e3"])
def test_a_number_may_have_an_exponent(expected):
    assert says(f"about {expected}", expected)
    assert not says(f"about {expected}", expected.rpartition("e")[2])


def test_a_decimal_of_a_million_digits_is_refused():
    with pytest.raises(OnecardError, match="has too many digits"):
        expected_text(Decimal("1e999999999"), "answer", "a")


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_a_narrow_column_of_parquet_is_as_it_is_written(tmp_path, kind):
    import numpy as np

    numbers = np.array([0.1, 2.5], dtype=kind.to_pandas_dtype())
    table = pyarrow.table({"prompt": ["a", "b", "c"], "answer": pyarrow.array([*numbers, None], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert values(tmp_path / "x.parquet", "answer") == [0.1, 2.5, None]


def test_a_part_of_what_has_no_splits_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(OnecardError, match=r"split 'train\[:1\]': a file has no splits"):
        load_rows(str(tmp_path / "x.jsonl"), split="train[:1]")
    Dataset.from_list([{"prompt": "a"}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(OnecardError, match=r"split 'train\[:1\]': the dataset has no splits"):
        load_rows(str(tmp_path / "saved"), split="train[:1]")


def test_one_row_is_a_json_file(tmp_path):
    (tmp_path / "x.json").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert values(tmp_path / "x.json", "messages") == [[{"role": "user", "content": "a"}]]
    (tmp_path / "y.json").write_text('{"version": 1, "data": [{"prompt": "a"}]}')
    assert values(tmp_path / "y.json", "prompt") == ["a"]
