"""Scores, rankings and labelled answers: what a row becomes, what makes it a bad one, and who is held out together."""

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from onecard.data import (
    Row,
    hold_out,
    labelled_examples,
    load_rows,
    preference_examples,
    prompt_examples,
    ranking_examples,
    scored_examples,
)
from onecard.utils.errors import OnecardError
from tests.engine.data_material import BOT, CHATML, USER, answer, built, rows, say, sft, split

TOKENIZER = built("<s> $A")
SCORED = {"prompt": "Hello", "completion": " you", "score": 0.5}
RANKED = {"prompt": "Hello", "completions": [" you", " how", " user"]}
LABELLED = [
    {"prompt": "Hello", "completion": " you", "label": True},
    {"prompt": "I am", "completion": " fine", "label": 0},
    {"prompt": "And you", "completion": " today?", "label": 1.0},
]


def chat() -> Any:
    return built("$A", "<|im_end|>", CHATML)


def make(kind: str, *records: dict[str, Any], tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    function = {"scores": scored_examples, "rankings": ranking_examples, "labels": labelled_examples}[kind]
    return function(rows(*records), tokenizer, **{"max_length": 64, "skip_bad_rows": False, **settings})


def test_scores() -> None:
    made = make("scores", SCORED, SCORED | {"score": -3})
    assert [example.score for example in made.examples] == [0.5, -3.0]
    assert made.examples[0].sequence == answer("Hello", " you", TOKENIZER)
    assert made.notes == ()


def test_rankings_keep_their_order() -> None:
    [ranking] = make("rankings", RANKED).examples
    assert ranking.sequences == tuple(answer("Hello", text, TOKENIZER) for text in RANKED["completions"])
    twice = make("rankings", RANKED, RANKED | {"completions": [" you", " how", " you"]})
    assert twice.notes == ("1 of 2 rankings have answers with the same tokens",)


def test_the_mismatched_answer_is_the_next_row_s() -> None:
    made = make("labels", *LABELLED)
    assert [example.desirable for example in made.examples] == [True, False, True]
    texts = [(row["prompt"], row["completion"]) for row in LABELLED]
    for (prompt, completion), (_, other), example in zip(texts, texts[1:] + texts[:1], made.examples, strict=True):
        assert example.sequence == answer(prompt, completion, TOKENIZER)
        assert example.mismatched == answer(prompt, other, TOKENIZER)
    assert made.notes == ()


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_sort_and_prompts_side_by_side_are_counted(label: bool) -> None:
    one, two, three = (row | {"label": label} for row in LABELLED)
    made = make("labels", one, two, two, three)
    assert made.notes == (
        f"4 of 4 labels are {str(label).lower()}",
        "1 of 4 rows have the prompt of the next row, so its answer is not a mismatched one; shuffle the file",
    )


def test_the_mismatched_answer_comes_from_a_row_that_is_used() -> None:
    one, two, three = LABELLED
    made = make("labels", one, two | {"label": None}, three, skip_bad_rows=True)
    assert made.examples == make("labels", one, three).examples
    assert made.notes[-1] == "1 of 3 rows are bad and were skipped: x.jsonl:2: label is null"
    for records in ([one], [one, two | {"label": None}]):
        with pytest.raises(OnecardError, match=r"^x.jsonl:1: is the only usable row; expected 2 or more"):
            make("labels", *records, skip_bad_rows=True)


def test_without_mismatched_answers_no_row_needs_another() -> None:
    one = LABELLED[0]
    text, messages = {**one, "label": False}, {"prompt": [USER], "completion": [BOT], "label": True}
    [example] = make("labels", one, mismatched=False).examples
    assert example.sequence == answer("Hello", " you", TOKENIZER)
    assert len(example.mismatched) == 0
    assert make("labels", one, text, mismatched=False).notes == ()  # one prompt side by side
    made = make("labels", one, messages, tokenizer=chat(), mismatched=False)
    assert len(made.examples) == 2
    assert not any(len(example.mismatched) for example in made.examples)


def test_messages() -> None:
    tokenizer = chat()
    question, other = [say("user", "Hello")], [say("user", "And you")]
    [scored] = make("scores", {"prompt": question, "completion": [BOT], "score": 1}, tokenizer=tokenizer).examples
    assert scored.sequence == answer(question, [BOT], tokenizer)
    [ranking] = make("rankings", {"prompt": question, "completions": [[BOT], [say("assistant", "how")]]},
                     tokenizer=tokenizer).examples  # fmt: skip
    assert ranking.sequences[0] == scored.sequence
    labelled = make(
        "labels",
        {"prompt": question, "completion": [BOT], "label": True},
        {"prompt": other, "completion": [say("assistant", "how")], "label": False},
        tokenizer=tokenizer,
    ).examples
    assert labelled[1].mismatched == answer(other, [BOT], tokenizer)


QUESTION, GOOD, POOR = [USER], [say("assistant", "how")], [BOT]
MIXED = {
    "text and messages": ("sft", [{"text": "Hello there"}, {"messages": QUESTION + GOOD}]),
    "text and completions": ("sft", [{"prompt": "Hello", "completion": " you"}, {"text": "Hello there"}]),
    "messages in two forms": ("sft", [{"prompt": QUESTION, "completion": GOOD}, {"messages": QUESTION + POOR}]),
    "all that a table may hold": (
        "sft",
        [
            {"messages": QUESTION + GOOD, "score": 1.5},
            {"prompt": "", "completion": " you", "tag": "a"},
            {"prompt": "Hello", "completion": "", "label": True},
            {"text": "Hello there", "margin": 0.5},
        ],
    ),
    "pairs with their prompt and without": (
        "pairs",
        [
            {"prompt": QUESTION, "chosen": GOOD, "rejected": POOR, "margin": 0.5},
            {"chosen": QUESTION + GOOD, "rejected": QUESTION + POOR},
        ],
    ),
    "scores": ("scores", [SCORED, SCORED | {"tag": "a"}]),
    "rankings": ("rankings", [RANKED, RANKED | {"completions": [" you", " how"], "score": 2.0}]),
    "labels": ("labels", [LABELLED[0], LABELLED[0] | {"text": "Hello", "label": False}]),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize(("kind", "records"), MIXED.values(), ids=MIXED)
def test_null_is_no_column_in_a_table_of_several_kinds(
    tmp_path: Path, form: str, kind: str, records: list[dict[str, Any]]
) -> None:
    full = [dict.fromkeys(name for record in records for name in record) | record for record in records]
    path = tmp_path / f"x.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in full))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(full), path)
    else:
        datasets.Dataset.from_list(full).save_to_disk(str(path))

    def examples(found: Sequence[Row]) -> Any:
        if kind == "sft":
            return sft([row.values for row in found], chat()).examples
        if kind == "pairs":
            return preference_examples(found, chat(), max_length=64, skip_bad_rows=False).examples
        return make(kind, *(row.values for row in found), tokenizer=chat()).examples

    found = load_rows(str(path), split="train")
    assert any(None in row.values.values() for row in found)
    assert examples(found) == examples(rows(*records))


def test_numbers_may_be_decimals() -> None:
    assert make("scores", SCORED | {"score": Decimal("1.50")}).examples[0].score == 1.5
    assert make("labels", *LABELLED[1:], LABELLED[0] | {"label": Decimal(1)}).examples[-1].desirable


BAD = {
    "no score": ("scores", {"prompt": "a", "completion": "b"}, "no column 'score'; there are prompt, completion."),
    "misspelt score": (
        "scores",
        {"prompt": "a", "completion": "b", "scor": 1},
        "no column 'score'; there are prompt, completion, scor. Did you mean 'scor'?",
    ),
    "null score": ("scores", SCORED | {"score": None}, "score is null"),
    "text score": ("scores", SCORED | {"score": "3"}, "score: expected a number, got text"),
    "truth as score": ("scores", SCORED | {"score": True}, "score: expected a number, got true or false"),
    "endless score": ("scores", SCORED | {"score": float("inf")}, "score: expected a finite number, got inf"),
    "scored without a completion": (
        "scores",
        {"prompt": "a", "score": 1},
        "no column 'completion'; there are prompt, score.",
    ),
    "one text": (
        "rankings",
        RANKED | {"completions": "b"},
        "completions: expected a list of answers, best first, got text",
    ),
    "one answer": ("rankings", RANKED | {"completions": ["b"]}, "completions: expected 2 answers or more, got 1"),
    "null answer": (
        "rankings",
        RANKED | {"completions": ["b", None]},
        "completions[1]: expected text or a list of messages, got null",
    ),
    "mixed answers": (
        "rankings",
        RANKED | {"completions": ["b", [BOT]]},
        "completions[1] is messages but prompt is text",
    ),
    "answer by the user": (
        "rankings",
        {"prompt": [USER], "completions": [[BOT], [USER]]},
        "completions[1]: expected an assistant's message first and last, got user",
    ),
    "ranking of an answered prompt": (
        "rankings",
        {"prompt": [USER, BOT], "completions": [[BOT], [BOT]]},
        "prompt: its last message is the assistant's; expected a message to answer",
    ),
    "null label": ("labels", LABELLED[0] | {"label": None}, "label is null"),
    "label 2": ("labels", LABELLED[0] | {"label": 2}, "label: expected true or false (or 1 or 0), got 2"),
    "text label": ("labels", LABELLED[0] | {"label": "yes"}, "label: expected true or false (or 1 or 0), got text"),
    "messages beside text": (
        "labels",
        {"prompt": [USER], "completion": [BOT], "label": True},
        "the next row's completion is text but prompt is messages",
    ),
}


@pytest.mark.parametrize(("kind", "record", "message"), BAD.values(), ids=BAD)
def test_bad_rows(kind: str, record: dict[str, Any], message: str) -> None:
    good = {"scores": SCORED, "rankings": RANKED, "labels": LABELLED[1]}[kind]
    tokenizer = chat()
    with pytest.raises(OnecardError) as error:
        make(kind, record, good, tokenizer=tokenizer)
    assert str(error.value) == f"x.jsonl:1: {message}"


@pytest.mark.parametrize("score", [-0.01, 1.01])
def test_scores_outside_their_bounds_are_bad(score: float) -> None:
    assert make("scores", SCORED | {"score": 0}, SCORED | {"score": 1}, bounds=(0.0, 1.0)).bad_rows == ()
    with pytest.raises(OnecardError) as error:
        make("scores", SCORED | {"score": score}, bounds=(0.0, 1.0))
    assert str(error.value) == f"x.jsonl:1: score: {score:g}, expected 0 to 1"


# --- what is held out together ---


def pair(prompt: Any, chosen: Any = " you") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": " how"}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_of_one_prompt_are_one_group_however_they_are_cut(mode: str) -> None:
    """With keep_end, two answers of different lengths leave different ends of one prompt."""
    settings: dict[str, Any] = {"max_length": 14, "truncation_mode": mode, "skip_bad_rows": False}
    prompt, long = "Hello there, how are", " you today? I am fine, thank you."
    made: list[Any] = [
        sft([{"prompt": prompt, "completion": text} for text in (" you", long)], TOKENIZER, **settings),
        make("scores", SCORED | {"prompt": prompt}, SCORED | {"prompt": prompt, "completion": long}, **settings),
        make("rankings", RANKED | {"prompt": prompt}, {"prompt": prompt, "completions": [long, " a"]}, **settings),
        make(
            "labels", LABELLED[0] | {"prompt": prompt}, {"prompt": prompt, "completion": long, "label": 0}, **settings
        ),
        preference_examples(rows(pair(prompt), pair(prompt, long)), TOKENIZER, **settings),
    ]
    for item in made:
        assert item.groups[0] == item.groups[1], item
    different = [split(example)[0] for example in made[0].examples]
    assert (different[0] == different[1]) == (mode == "keep_start")


def test_prompts_stay_together_when_they_are_learned_too() -> None:
    records = [{"prompt": f"Hello {number // 2}", "completion": f" you {number}"} for number in range(12)]
    made = sft(records, TOKENIZER, completion_only_loss=False)
    assert all(all(example.response_mask) for example in made.examples)
    _, held = hold_out(made.examples, made.groups, test_size=0.3, seed=0)
    assert len(held) == 4
    assert len({tuple(example.tokens[:-4]) for example in held}) == 2
    talks = [{"messages": [say("user", f"Hello {number // 2}"), say("assistant", str(number))]} for number in range(4)]
    for only in (True, False):
        groups = sft(talks, chat(), assistant_only_loss=only).groups
        assert groups[0] == groups[1] != groups[2] == groups[3]


def test_answers_to_an_empty_prompt_are_groups_of_their_own() -> None:
    texts = sft([{"text": text} for text in ("Hello", "I am", "Hello")], TOKENIZER).groups
    assert texts[0] == texts[2] != texts[1]
    answers = sft([{"prompt": "", "completion": text} for text in ("Hello", "I am", "Hello")], TOKENIZER).groups
    assert answers[0] == answers[2] != answers[1]
    assert len(set(preference_examples(rows(pair("", "a"), pair("", "b")), TOKENIZER, max_length=9,
                                       skip_bad_rows=False).groups)) == 2  # fmt: skip


def test_prompts_to_answer_are_groups() -> None:
    made = prompt_examples(rows({"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "solution": 3}), TOKENIZER)
    assert made.groups[0] == made.groups[2] != made.groups[1]


def test_every_row_in_the_documentation_is_what_it_is_said_to_be() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ([a-z ,]+?) \| `[^|]*\| `(\{.*?\})`", page, flags=re.MULTILINE)
    records = {kind: json.loads(row) for kind, row in found}
    limits: dict[str, Any] = {"max_length": 200, "skip_bad_rows": False}
    sft_kinds = ("text", "conversation", "prompt and completion")
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {
        **dict.fromkeys(sft_kinds, lambda row: sft([row], chat(), max_length=200)),
        "pair": lambda row: preference_examples(rows(row), TOKENIZER, **limits),
        "score": lambda row: make("scores", row),
        "ranking, the best first": lambda row: make("rankings", row),
        "labelled answer": lambda row: make("labels", row, LABELLED[1]),
        "prompt": lambda row: prompt_examples(rows(row), TOKENIZER),
    }
    assert records.keys() == makers.keys()
    for kind, record in records.items():
        assert not makers[kind](record).bad_rows


@pytest.mark.parametrize("name", ["image", "images"])
def test_rows_of_images_are_not_taken_for_text(name: str) -> None:
    """TRL's columns of vision-language rows; null and an empty list are none."""
    plain = SCORED | {name: []}
    assert make("scores", plain, plain | {name: None}).examples == make("scores", SCORED, SCORED).examples
    with pytest.raises(OnecardError, match=rf"{name}: images are not supported"):
        make("scores", SCORED | {name: ["cat.png"]})
