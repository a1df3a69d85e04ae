"""CSV cells: what is text and what a number, what is null, and that Python's own strict reader finds the same cells."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.data import Row, labelled_examples, load_rows, preference_examples, scored_examples, sft_examples
from onecard.data.csv_table import records
from onecard.rewards.builtin import expected_text, is_correct
from onecard.utils.errors import OnecardError
from tests.engine.data_material import built


def load(folder: Path, text: str, name: str = "rows.csv") -> list[Row]:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return load_rows(str(folder / name), split="train")


def column(folder: Path, name: str, *cells: str) -> list[Any]:
    """The values of a column with these cells, beside one that keeps its lines from being blank."""
    rows = load(folder, "\n".join([f"{name},more", *(f"{cell},x" for cell in cells)]))
    return [row.values[name] for row in rows]


ODD = [
    "12345678901234567890123", "9223372036854775808", "02134", "-0", "+5", "1.50", "1.0e3", "1e5", ".5", "5.", "1_000",
    "0x10", " 5", "5 ", "1,5", "True", "FALSE", "NA", "N/A", "NaN", "nan", "null", "None", "inf", "-inf", "12:30",
    "09:05:01", "2024-01-01", "2024-01-01T12:00:00Z", "1/2", "$5", "5%", "٣", "0.12345678901234567890", "#N/A", "-",
]  # fmt: skip


@pytest.mark.parametrize("cell", ODD)
@pytest.mark.parametrize("name", ["answer", "solution", "text", "completion", "weight"])
def test_what_is_no_plain_number_keeps_its_text(tmp_path: Path, name: str, cell: str) -> None:
    quoted = f'"{cell}"' if "," in cell else cell
    assert column(tmp_path, name, quoted) == [cell]
    assert column(tmp_path, name, "5", quoted, "", "0.5")[:2] == ["5", cell]  # the whole column is text


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["5", "-17", "0"], [5, -17, 0]),
        (["5", "", "0.25"], [5, None, 0.25]),
        (['"5"', '""', "1"], [5, None, 1]),
        (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
        (["1e-07", "0.1"], [1e-07, 0.1]),
        (["", ""], [None, None]),
    ],
)
def test_numbers_that_can_be_written_back_are_numbers(tmp_path: Path, cells: list[str], values: list[Any]) -> None:
    found = column(tmp_path, "weight", *cells)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]
    assert column(tmp_path, "answer", *cells) == [cell.strip('"') if cell else None for cell in cells]


@pytest.mark.parametrize(
    ("name", "cells", "values"),
    [
        ("score", ["1.50", "+2", "1e1", " 3 ", ""], [1.5, 2.0, 10.0, 3.0, None]),
        ("margin", ["0.5", "2", ""], [0.5, 2, None]),
        ("margin", ["1.0", "many", "1_0"], [1.0, "many", "1_0"]),
        ("label", ["True", "false", "TRUE", "1", "0.0", ""], [True, False, True, 1, 0, None]),
        ("label", ["1", "0"], [1, 0]),
        ("label", ["good", "True"], ["good", True]),
        ("label", ["02134", "007"], ["02134", "007"]),
    ],
)
def test_scores_margins_and_labels_are_read_by_name(
    tmp_path: Path, name: str, cells: list[str], values: list[Any]
) -> None:
    found = column(tmp_path, name, *cells)
    assert found == values
    assert [type(value) is bool for value in found] == [type(value) is bool for value in values]


def test_csv_keeps_text_columns_and_reads_numbers_elsewhere(tmp_path: Path) -> None:
    assert [row.values for row in load(tmp_path, "prompt,chosen,margin\r\n1,NA,0.5\r\n,007,2\r\n")] == [
        {"prompt": "1", "chosen": "NA", "margin": 0.5},
        {"prompt": "", "chosen": "007", "margin": 2.0},
    ]


def test_an_empty_cell_is_null_and_a_quoted_one_empty_text(tmp_path: Path) -> None:
    [row] = load(tmp_path, 'prompt,completion,chosen,note,other\n,,"",,""\n')
    assert row.values == {"prompt": "", "completion": None, "chosen": "", "note": None, "other": None}
    rows = load(tmp_path, 'note,answer\n"",""\nx,\n')
    assert [row.values for row in rows] == [{"note": "", "answer": ""}, {"note": "x", "answer": None}]


def test_one_csv_file_may_hold_rows_of_several_kinds(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_length": 64, "skip_bad_rows": False}
    rows = load(tmp_path, "text,prompt,completion\nOnce,,\n,Hello, you\n,, fine\n")
    made = sft_examples(rows, built("<s> $A"), completion_only_loss=True, assistant_only_loss=True, **limits)
    assert [sum(example.response_mask) for example in made.examples] == [len(made.examples[0]), 2, 2]
    rows = load(tmp_path, "prompt,chosen,rejected,margin\na,b,c,1.50\nd,e,f,\n")
    assert [pair.margin for pair in preference_examples(rows, built(), **limits).examples] == [1.5, 0.0]
    rows = load(tmp_path, "prompt,completion,score,label\na,b,1.50,True\nd,e,+2,false\n")
    assert [one.score for one in scored_examples(rows, built(), **limits).examples] == [1.5, 2.0]
    assert [one.desirable for one in labelled_examples(rows, built(), **limits).examples] == [True, False]


def test_line_breaks_quotes_and_long_cells(tmp_path: Path) -> None:
    value = 'a "line"\r\n' * 300_000  # more than the limit of Python's reader
    quoted = value.replace('"', '""')
    rows = load(tmp_path, f'prompt,number\n"{quoted}",7\n\nsay "hi",8\r\nc,9')
    assert [row.values for row in rows] == [
        {"prompt": value, "number": 7},
        {"prompt": 'say "hi"', "number": 8},
        {"prompt": "c", "number": 9},
    ]
    assert [row.number for row in rows] == [2, 4, 5]


PIECES = ["a", "b", '"', '""', ",", "\t", "\n", "\r\n", "\r", " ", '"a"']


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from([",", "\t"]))
def test_python_s_strict_reader_finds_the_same_cells(pieces: list[str], delimiter: str) -> None:
    text = "".join(pieces)
    try:
        expected = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter) if row]
    except csv.Error:
        with pytest.raises(OnecardError, match=r"^x: CSV parse error: Row #\d+: "):
            list(records("x", text, delimiter))
        return
    assert [[cell or "" for cell in cells] for _, cells, _ in records("x", text, delimiter)] == expected


ANSWERS = ["12345678901234567890123", "02134", "True", "False", "NA", "None", "nan", "12:30", "2024-01-01", "5", "1.50"]


@pytest.mark.parametrize("form", ["file", "folder", "jsonl"])
def test_the_right_answer_scores_whatever_it_looks_like(tmp_path: Path, form: str) -> None:
    lines = ["prompt,answer", *(f"Which?,{answer}" for answer in ANSWERS)]
    if form == "jsonl":
        lines = [f'{{"prompt": "Which?", "answer": "{answer}"}}' for answer in ANSWERS]
    name = "a.jsonl" if form == "jsonl" else "a.csv"
    (tmp_path / name).write_text("\n".join(lines))
    rows = load_rows(str(tmp_path if form == "folder" else tmp_path / name), split="train")
    expected = [expected_text(row.values["answer"], "answer", "Which?") for row in rows]
    table = [[is_correct(answer, right) for right in expected] for answer in ANSWERS]
    assert table == [[one == other for other in ANSWERS] for one in ANSWERS]
