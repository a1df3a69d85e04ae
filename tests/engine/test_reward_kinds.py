"""Which kind of rows a reward model is trained from, and the settings that fit only one kind."""

from __future__ import annotations

from typing import Any

import pytest

from onecard.algorithms.reward.kinds import check_settings, collate, detect_kind, kind_of, tokenize
from onecard.config import RewardConfig
from onecard.data.batches import PreferenceBatch, RankingBatch, ScoredBatch
from onecard.utils.errors import OnecardError
from tests.engine.data_material import built, rows

PAIR = {"prompt": "Hello", "chosen": " you", "rejected": " how", "score": 3}
SCORED = {"prompt": "Hello", "completion": " you", "score": 0.5, "completions_seen": 2}
RANKED = {"prompt": "Hello", "completions": [" you", " how"]}
RECORDS = {"pairs": (PAIR, PreferenceBatch), "scores": (SCORED, ScoredBatch), "rankings": (RANKED, RankingBatch)}


@pytest.mark.parametrize("name", RECORDS)
def test_the_columns_choose_the_kind(name: str) -> None:
    record, batch = RECORDS[name]
    found = rows(record, record)
    assert detect_kind(found)[0].name == name
    made = tokenize(found, built("<s> $A"), 64, RewardConfig())
    assert isinstance(collate(made.examples), batch)


@pytest.mark.parametrize("name", RECORDS)
def test_null_columns_choose_no_kind(name: str) -> None:
    every = dict.fromkeys(["prompt", "chosen", "rejected", "margin", "completion", "score", "completions", "extra"])
    found = rows(every | RECORDS[name][0], RECORDS[name][0])
    assert detect_kind(found)[0].name == name
    assert len(tokenize(found, built("<s> $A"), 64, RewardConfig()).examples) == 2
    assert kind_of(rows(every)[0]) is None
    with pytest.raises(OnecardError, match=r"or 'completions'; every column is null \(prompt, chosen, "):
        detect_kind(rows(every, every))


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"chosen": " you"}, "pairs"),
        ({"chosen": " you", "rejected": None, "completions": None}, "pairs"),
        ({"chosen": None, "rejected": None, "completion": " you", "score": None}, "scores"),
        ({"prompt": "Hello", "score": 1}, "scores"),
        ({"completion": "a", "completions": ["a", "b"]}, "rankings"),
    ],
)
def test_a_row_that_lacks_a_column_is_of_the_kind_that_it_begins(record: dict[str, Any], name: str) -> None:
    kind = kind_of(rows(record)[0])
    assert kind is not None
    assert kind.name == name


def test_mixed_kinds_name_both_rows() -> None:
    with pytest.raises(OnecardError) as error:
        list(detect_kind(rows(SCORED, SCORED, RANKED))[1])
    assert str(error.value) == (
        "x.jsonl:3: a row of rankings, but x.jsonl:1 is a row of scores; expected one kind of rows in a dataset."
    )


def test_rows_of_no_kind() -> None:
    with pytest.raises(OnecardError) as error:
        detect_kind(rows({"prompt": "a", "chosn": "b"}))
    assert str(error.value) == (
        "x.jsonl:1: no column 'chosen' + 'rejected', or 'completion' + 'score', or 'completions'; there are prompt, "
        "chosn. Did you mean 'chosn'?"
    )


def test_a_row_of_no_kind_among_others_is_a_bad_row() -> None:
    odd = rows(SCORED, {"prompt": "Hello"})
    with pytest.raises(OnecardError, match=r"^x\.jsonl:2: no column 'completion'"):
        tokenize(odd, built(), 64, RewardConfig())
    made = tokenize(odd, built(), 64, RewardConfig(skip_bad_rows=True))
    assert len(made.examples) == 1


@pytest.mark.parametrize(
    ("settings", "record", "message"),
    [
        (
            {"score_activation": "sigmoid"},
            PAIR,
            "score_activation: sigmoid is for rows with scores, but x.jsonl has pairs.",
        ),
        (
            {"score_activation": "sigmoid"},
            RANKED,
            "score_activation: sigmoid is for rows with scores, but x.jsonl has rankings.",
        ),
        (
            {"center_rewards_coefficient": 0.5},
            SCORED,
            "center_rewards_coefficient: 0.5 is for pairs and rankings, but x.jsonl has scores.",
        ),
    ],
)
def test_settings_of_another_kind(settings: dict[str, Any], record: dict[str, Any], message: str) -> None:
    config = RewardConfig(dataset="x.jsonl", **settings)
    found = tokenize(rows(record), built("<s> $A"), 64, config).examples  # held-out rows may be of any kind
    with pytest.raises(OnecardError) as error:
        check_settings(found, config)
    assert str(error.value) == message


def test_a_score_that_no_sigmoid_gives_is_a_bad_row() -> None:
    with pytest.raises(OnecardError, match=r"^x\.jsonl:1: score: 2, expected 0 to 1$"):
        tokenize(rows(SCORED | {"score": 2}), built(), 64, RewardConfig(score_activation="sigmoid"))


@pytest.mark.parametrize("name", RECORDS)
def test_truncation_mode_reaches_every_kind(name: str) -> None:
    record = RECORDS[name][0] | {"prompt": "Hello there, how are you"}
    notes = tokenize(rows(record), built(), 4, RewardConfig(truncation_mode="keep_end")).notes
    assert notes[0] == "1 of 1 prompts were cut at their beginning"
    with pytest.raises(OnecardError, match=r"tokens, expected at most 4 \(max_length\)"):
        tokenize(rows(record), built(), 4, RewardConfig(truncation_mode="error"))
