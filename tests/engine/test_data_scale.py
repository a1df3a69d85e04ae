"""Many rows: tokenized together, held as arrays, streamed from their files, and kept on disk for the next run."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.data import (
    Tokenized,
    files,
    hold_out,
    labelled_examples,
    load_rows,
    open_rows,
    preference_examples,
    prompt_examples,
    ranking_examples,
    scored_examples,
    sft_examples,
    tokenize_rows,
    tokens,
)
from onecard.data.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence
from onecard.data.example_arrays import all_lengths, all_numbers, all_tokens, as_examples
from onecard.data.files import dataset_rows
from onecard.data.templates import template_date
from onecard.data.tokens import encode, encode_batch
from onecard.training.identity import examples_digest
from onecard.utils.errors import OnecardError
from tests.engine.data_material import CHATML, all_tokenizers, built, rows

TEXTS = ["Hello there", " how are", "", "you\ttoday?\n", "<s>Hello</s>", "é 漢字", "  ", "a</s>b"]
DATED = "{{ strftime_now('%Y') }}" + CHATML


def some(count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows that have the columns of every kind; each fifth is bad in one way or another."""
    made = []
    for place in range(count):
        text, other, third = (TEXTS[(place * step) % len(TEXTS)] for step in (1, 3, 5))
        row = {
            "prompt": f"Hello {text}",
            "chosen": other,
            "rejected": third,
            "completion": f"{other}{place}",
            "completions": [other, third],
            "score": place / 7,
            "margin": place / 3,
            "label": place % 2 == 0,
            "text": f"{text}{place}",
        }
        broken = {"prompt": None, "text": 5, "chosen": 5, "completion": [], "completions": [""]}
        made.append(row | broken | more if place % 5 == 4 else row | more)
    return made


def sft(rows: Iterable[Any], tokenizer: Any, **settings: Any) -> Tokenized[TokenSequence]:
    return sft_examples(rows, tokenizer, completion_only_loss=True, assistant_only_loss=True, **settings)


KINDS: dict[str, Callable[..., Tokenized[Any]]] = {
    "sft": sft,
    "pairs": preference_examples,
    "scores": scored_examples,
    "rankings": ranking_examples,
    "labels": labelled_examples,
    "prompts": prompt_examples,
}
ONE, TWO = TokenSequence((1, 2, 3), (False, True, True)), TokenSequence((7,), (True,))
RECORDS = {
    "sft": [ONE, TWO],
    "pairs": [PreferencePair(ONE, TWO, 0.5), PreferencePair(TWO, TWO)],
    "scores": [ScoredSequence(ONE, -1.25), ScoredSequence(TWO, 0.1)],
    "rankings": [Ranking((ONE, TWO, ONE)), Ranking((TWO, ONE))],
    "labels": [LabelledSequence(ONE, True, TWO), LabelledSequence(TWO, False, TokenSequence((), ()))],
}


# --- together


@pytest.mark.parametrize("tokenizer", all_tokenizers())
def test_texts_have_the_same_tokens_together_and_alone(tokenizer: Callable[[], Any]) -> None:
    assert encode_batch(TEXTS, tokenizer()) == [encode(text, tokenizer()) for text in TEXTS]


def test_a_tokenizer_that_changes_texts_itself_is_asked_itself() -> None:
    class Lower(type(built())):  # type: ignore[misc]
        def __call__(self, text: str, **settings: Any) -> Any:
            return super().__call__(text.lower(), **settings)

    own = Lower(tokenizer_object=built().backend_tokenizer)
    assert encode_batch(["Hello", "You"], own) == [encode("hello", built()), encode("you", built())]


def test_truncation_in_a_tokenizers_file_cuts_nothing() -> None:
    cutting = built("<s> $A").__class__(tokenizer_object=built("<s> $A").backend_tokenizer)
    cutting.backend_tokenizer.enable_truncation(2)
    assert encode_batch(TEXTS, cutting) == [encode(text, built("<s> $A")) for text in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_are_tokenized_together_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 3, 100):
        monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", size)
        made = KINDS[kind](rows(*some(23)), built("<s> $A"), max_length=24, skip_bad_rows=True)
        found.append((list(made.examples), list(made.groups), made.notes, made.bad_rows))
    assert found[0] == found[1] == found[2]
    assert [bad.number for bad in found[0][3]] == [5, 10, 15, 20]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_bad_row_is_named(kind: str) -> None:
    with pytest.raises(OnecardError, match=r"^x\.jsonl:5: "):
        KINDS[kind](rows(*some(23)), built("<s> $A"), max_length=24, skip_bad_rows=False)


def test_a_bad_row_is_named_before_a_later_unreadable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read a batch ahead."""

    def unreadable_at(number: int) -> Any:
        yield from rows(*some(23))[: number - 1]
        raise OnecardError(f"x.jsonl:{number}: not JSON")

    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 3)
    for number, named in ((8, 5), (4, 4)):
        with pytest.raises(OnecardError, match=rf"^x\.jsonl:{named}: "):
            KINDS["pairs"](unreadable_at(number), built("<s> $A"), max_length=24, skip_bad_rows=False)


def test_a_tokenizer_with_code_of_its_own_stays_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not be thread-safe, or belong to a thread as an open database does."""
    threads = set()

    class Own(type(built())):  # type: ignore[misc]
        def __call__(self, *texts: Any, **settings: Any) -> Any:
            threads.add(threading.current_thread())
            return super().__call__(*texts, **settings)

    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 3)
    own = Own(tokenizer_object=built("<s> $A").backend_tokenizer, **built("<s> $A").special_tokens_map)
    for kind in KINDS:
        KINDS[kind](rows(*some(23)), own, max_length=24, skip_bad_rows=True)
    assert threads == {threading.current_thread()}


# --- arrays


@pytest.mark.parametrize("kind", RECORDS)
def test_arrays_give_the_records_back(kind: str) -> None:
    records = RECORDS[kind] * 3
    examples = as_examples(records, type(records[0]))
    assert list(examples) == records
    assert examples == records
    assert examples[-1] == records[-1]
    assert examples[1:4] == records[1:4]
    assert examples.take([4, 0])[0] == records[4]
    assert examples.take([4, 0]).take([1]) == records[:1]
    for some in (examples, examples.take([3, 2, 5])):
        assert examples_digest(some) == examples_digest(list(some))
        assert list(all_lengths(some)) == list(all_lengths(list(some)))
        assert [list(each) for each in all_numbers(some)] == [list(each) for each in all_numbers(list(some))]
    assert set().union(*all_tokens(examples)) == {1, 2, 3, 7}
    with pytest.raises(IndexError):
        examples[len(records)]


def test_arrays_are_held_out_as_lists_are() -> None:
    records = [TokenSequence((place,), (True,)) for place in range(50)]
    groups = [place % 17 for place in range(50)]
    train, test = hold_out(as_examples(records, TokenSequence), groups, test_size=0.2, seed=3)
    assert (list(train), list(test)) == hold_out(records, groups, test_size=0.2, seed=3)


# --- from files


def written(folder: Path, count: int = 23, name: str = "x.jsonl", **more: Any) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in some(count, **more)))
    return path


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every file is a large one; the tokens of its rows are kept in this folder."""
    monkeypatch.setattr(files, "LARGE_BYTES", 1)
    monkeypatch.setattr(files, "LARGE_ROWS", 1)
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_rows_of_a_large_file_are_not_held(large: Path, tmp_path: Path) -> None:
    found = open_rows(str(written(tmp_path)), split="train")
    reading = iter(found)
    first = weakref.ref(next(reading))
    next(reading)
    assert first() is None
    assert found.total == 23
    assert list(found) == list(found) == load_rows(str(tmp_path / "x.jsonl"), split="train")


@pytest.mark.parametrize("form", ["jsonl", "folder", "json", "csv", "parquet", "saved"])
def test_large_data_reads_as_small_data_does(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path = tmp_path / f"x.{form}"
    plain = [{"prompt": f"Hello {place}", "completion": " you", "score": place / 2} for place in range(5)]
    table = datasets.Dataset.from_list(plain)
    {
        "jsonl": lambda: table.to_json(path),
        "folder": lambda: (path.mkdir(), table.to_json(path / "a.jsonl"), table.to_json(path / "b.jsonl")),
        "json": lambda: path.write_text(json.dumps(plain)),
        "csv": lambda: table.to_csv(path),
        "parquet": lambda: table.to_parquet(path),
        "saved": lambda: table.save_to_disk(path),
    }[form]()
    small = load_rows(str(path), split="train")
    monkeypatch.setattr(files, "LARGE_BYTES", 1)
    monkeypatch.setattr(files, "LARGE_ROWS", 1)
    found = open_rows(str(path), split="train")
    assert found.identity
    assert list(found) == small
    assert len(small) == 5 * (1 + (form == "folder"))


def test_datasets_stream_through_the_same_path() -> None:
    import datasets

    table = datasets.Dataset.from_list(some(4))
    for source in (table, table.to_iterable_dataset()):
        made = preference_examples(dataset_rows("mine", source), built(), max_length=64, skip_bad_rows=False)
        assert len(made.examples) == 4
    assert dataset_rows("mine", table.to_iterable_dataset()).total is None


# --- kept


def tokenized(path: Path, kind: str = "pairs", tokenizer: Any = None, **settings: Any) -> Tokenized[Any]:
    settings = {"max_length": 24, "skip_bad_rows": True, **settings}
    return KINDS[kind](open_rows(str(path), split="train"), tokenizer or built("<s> $A"), **settings)


def content(made: Tokenized[Any]) -> tuple[Any, ...]:
    return list(made.examples), list(made.groups), made.notes, made.bad_rows


@pytest.fixture
def no_tokenizing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse() -> None:
        def fail(*_: Any) -> Any:
            raise AssertionError("tokenized again")

        monkeypatch.setattr(tokenize_rows, "encode_transcripts", fail)

    return refuse


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prompts"])
def test_the_next_run_reads_what_the_first_has_kept(
    kind: str, large: Path, tmp_path: Path, no_tokenizing: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    first = tokenized(path, kind)
    assert len(list(large.iterdir())) == 1
    small = content(
        KINDS[kind](load_rows(str(path), split="train"), built("<s> $A"), max_length=24, skip_bad_rows=True)
    )
    no_tokenizing()
    assert content(tokenized(path, kind)) == content(first) == small
    assert f"data: {len(first.examples)} tokenized examples are read from {large}" in capsys.readouterr().err


def test_small_data_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    tokenized(written(tmp_path))
    assert not (tmp_path / "cache").exists()


CHANGES: dict[str, Callable[[Path], Any]] = {
    "rows": lambda path: tokenized(written(path, count=24)),
    "place": lambda path: tokenized(written(path, name="y.jsonl")),  # bad rows are named by it
    "tokenizer": lambda path: tokenized(written(path), tokenizer=built("$A")),
    "length": lambda path: tokenized(written(path), max_length=25),
    "truncation": lambda path: tokenized(written(path), truncation_mode="keep_end"),
    "kind": lambda path: tokenized(written(path), "scores"),
    "bounds": lambda path: tokenized(written(path), "scores", bounds=(0.0, 1.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_examples_depend_on_is_told_apart(change: str, large: Path, tmp_path: Path) -> None:
    tokenized(written(tmp_path))
    if change == "bounds":
        tokenized(written(tmp_path), "scores")
    before = len(list(large.iterdir()))
    CHANGES[change](tmp_path)
    assert len(list(large.iterdir())) == before + 1


@pytest.mark.parametrize(("template", "count"), [(CHATML, 1), (DATED, 2)])
def test_the_date_counts_where_the_template_writes_it(template: str, count: int, large: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "fine"}]
    path.write_text(json.dumps({"messages": messages}))
    made = []
    for date in ("2024-05-01", "2024-05-01", "2025-05-01"):
        with template_date(date):
            made.append(list(tokenized(path, "sft", built("$A", template=template), max_length=64).examples))
    assert len(list(large.iterdir())) == count
    assert (made[0] == made[1], made[0] == made[2]) == (True, count == 1)


@pytest.mark.parametrize("name", ["tokens", "response_mask", "stops", "firsts", "numbers", "groups", "account.json"])
def test_a_flipped_bit_is_found(name: str, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    first = content(tokenized(path))
    [folder] = large.iterdir()
    damaged = bytearray((folder / name).read_bytes())
    damaged[2] ^= 4
    (folder / name).unlink()  # the first run still reads from it
    (folder / name).write_bytes(damaged)
    assert content(tokenized(path)) == first
    assert "is damaged" in capsys.readouterr().err
    assert content(tokenized(path)) == first
    assert "tokenized examples are read from" in capsys.readouterr().err


def test_a_disk_that_takes_nothing_costs_the_next_run_its_time(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    large.parent.mkdir()
    large.write_text("a file where the folder would be")
    made = tokenized(path)
    assert len(made.examples) == 19
    assert "cannot be written" in capsys.readouterr().err
    assert large.read_text() == "a file where the folder would be"


def test_a_run_that_is_stopped_leaves_nothing_half_written(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    real, calls = tokens.encode_transcripts, []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(tokenize_rows, "BATCH_ROWS", 5)
    monkeypatch.setattr(tokenize_rows, "encode_transcripts", stopped)
    with pytest.raises(KeyboardInterrupt):
        tokenized(path)
    assert not list(large.iterdir())
    assert len(tokenized(path).examples) == 19


def test_what_a_killed_run_has_left_is_cleared(large: Path, tmp_path: Path) -> None:
    path = written(tmp_path)
    first = content(tokenized(path))
    [folder] = large.iterdir()
    half = folder.with_name(f".{folder.name}.999999999.tmp")
    folder.rename(half)
    (half / "account.json").unlink()
    assert content(tokenized(path)) == first
    assert list(large.iterdir()) == [folder]


def test_the_same_prompt_is_one_group_wherever_it_is_read() -> None:
    """Equal before anything was cut, and different where only the end differs that was cut off."""
    one = rows({"prompt": "Hello", "chosen": "a", "rejected": "b"})[0]
    far = replace(one, values={**one.values, "prompt": "Hello there, how are you today?"})
    made = preference_examples([one, far, one], built(), max_length=4, truncation_mode="keep_end", skip_bad_rows=False)
    assert made.groups[0] == made.groups[2] != made.groups[1]
