"""Tokens and masks: what a response is, to the token, on tokenizers that disagree about everything around it."""

from typing import Any

import pytest

from onecard.data import preference_examples, prompt_examples, prompt_tokens
from onecard.data.batches import TokenSequence
from onecard.utils.errors import OnecardError
from tests.engine.data_material import (
    BOT,
    CHATML,
    USER,
    answer,
    built,
    every_tokenizer,
    pairs,
    real,
    real_rows,
    rows,
    say,
    sft,
    spelled,
    split,
)

BORDERS = [  # prompt, response: a space on neither side, on one, on both; inside a word; line breaks; nothing
    ("Hello there,", " how are you?"),
    ("Hello there, ", "how are you?"),
    ("Hello there, ", " how are you?"),
    ("Hello there,", "how are you?"),
    ("Hello th", "ere, how"),
    ("Once upon", " a time"),
    ("Once upon ", "a time"),
    ("I am fine,\n", "\nAnd you?"),
    ("I am fine,\n\n", "And you?"),
    ("", "Hello there"),
    ("Hello there", ""),
]


@every_tokenizer
@pytest.mark.parametrize(("prompt", "response"), BORDERS)
def test_the_prompt_is_what_generation_feeds(make: Any, prompt: str, response: str) -> None:
    tokenizer = make()
    sequence = answer(prompt, response, tokenizer)
    before, after = split(sequence)
    assert before == prompt_tokens(prompt, tokenizer)
    assert after[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in after[:-1]
    # Read together they are the two texts, with no space lost or gained on the border.
    assert spelled([*before, *after[:-1]], tokenizer) == spelled(prompt_tokens(prompt + response, tokenizer), tokenizer)


@every_tokenizer
@pytest.mark.parametrize("prompt", ["Hello", "Hello ", " Hello", "", "Hello <s> you", "I am fine,\n"])
def test_prompt_ids_are_the_tokenizers_own_but_for_an_eos_behind(make: Any, prompt: str) -> None:
    tokenizer = make()
    own = list(tokenizer(prompt)["input_ids"])
    adds_eos = list(tokenizer("Hello")["input_ids"])[-1] == tokenizer.eos_token_id
    assert prompt_tokens(prompt, tokenizer) == (own[:-1] if adds_eos else own)


def test_an_eos_that_the_prompt_spells_out_stays() -> None:
    tokenizer = built("<s> $A </s>")
    eos = tokenizer.eos_token_id
    assert prompt_tokens("Hello</s>", tokenizer) == [*tokenizer("Hello")["input_ids"][:-1], eos]


def test_a_bos_that_the_text_spells_out_is_not_doubled() -> None:
    tokenizer = built("<s> $A")
    assert prompt_tokens("<s>Hello", tokenizer) == tokenizer("Hello")["input_ids"]
    [text] = sft([{"text": "<s>Hello</s>"}], tokenizer).examples
    assert list(text.tokens) == [*tokenizer("Hello")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("response", [" fine", " fine</s>", " fine</s></s>", " fine</s>\n"])
def test_an_eos_in_the_text_is_not_doubled(response: str) -> None:
    for form in ("$A", "<s> $A", "<s> $A </s>"):
        tokenizer = built(form)
        assert answer("I am", response, tokenizer) == answer("I am", " fine", tokenizer)


def test_one_id_for_bos_and_eos_is_told_apart_by_place() -> None:
    tokenizer = real("stories260K")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 1
    assert split(answer("Once upon", " a time", tokenizer)) == ([1, 403, 407], [261, 378, 1])
    assert split(answer("", "Once upon", tokenizer)) == ([1], [403, 407, 1])
    assert split(answer("", "", tokenizer)) == ([1], [1])
    [text] = sft([{"text": "Once upon"}], tokenizer).examples
    assert text == TokenSequence((1, 403, 407, 1), (True,) * 4)
    [text] = sft([{"text": ""}], tokenizer).examples
    assert text.tokens == (1, 1)


def test_a_token_across_the_border_is_split_there() -> None:
    """`Once upon a time` has the one token `upon_a_tim`, so the prompt's own ids are not the start of the whole's."""
    tokenizer = real("TinyStories-656K")
    fed = prompt_tokens("Once upon", tokenizer)
    assert tokenizer("Once upon a time")["input_ids"][: len(fed)] != fed
    before, after = split(answer("Once upon", " a time", tokenizer))
    assert before == fed
    assert after == [*tokenizer(" a time", add_special_tokens=False)["input_ids"], 2]


@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_no_space_is_put_into_a_word_that_the_border_cuts(name: str) -> None:
    """By itself a sentencepiece tokenizer would read `ere` as ` ere`."""
    tokenizer = real(name)
    sequence = answer("Once upon a ti", "me there was", tokenizer)
    assert spelled(sequence.tokens[1:-1], tokenizer) == "Once upon a time there was"


@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_a_border_anywhere_in_real_text_changes_no_character(name: str) -> None:
    tokenizer = real(name)
    for row in real_rows("text/tinystories.jsonl")[:20]:
        text = row.values["text"][:240]
        whole = spelled(tokenizer(text)["input_ids"], tokenizer)
        for place in range(0, len(text), 5):
            sequence = answer(text[:place], text[place:], tokenizer)
            assert spelled(sequence.tokens[:-1], tokenizer) == whole


@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_real_pairs(name: str) -> None:
    tokenizer = real(name)
    source = real_rows("prefs/rasbt_politeness.jsonl")[:150]
    made = preference_examples(source, tokenizer, max_length=2000, skip_bad_rows=False)
    assert len(made.examples) == len(source)
    assert not made.bad_rows
    for row, pair in zip(source, made.examples, strict=True):
        for side, column in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            before, after = split(side)
            assert before == tokenizer(row.values["prompt"])["input_ids"]
            assert after[-1] == tokenizer.eos_token_id
            whole = tokenizer(row.values["prompt"] + row.values[column])["input_ids"]
            assert spelled([*before, *after[:-1]], tokenizer) == spelled(whole, tokenizer)


def test_text_rows_are_learned_from_end_to_end() -> None:
    tokenizer = real("TinyStories-656K")
    source = real_rows("text/tinystories.jsonl")[:20]
    made = sft([row.values for row in source], tokenizer, max_length=4000)
    for row, sequence in zip(source, made.examples, strict=True):
        assert list(sequence.tokens) == [*tokenizer(row.values["text"])["input_ids"], 2]
        assert all(sequence.response_mask)


def test_of_several_kinds_a_row_is_the_first_that_is_whole() -> None:
    tokenizer = built("$A", "<|im_end|>", CHATML)
    chat, both, text = {"messages": [USER, BOT]}, {"prompt": "I am", "completion": " fine"}, {"text": "Hello"}
    assert sft([chat | both | text], tokenizer) == sft([chat], tokenizer)
    assert sft([text | both], tokenizer) == sft([both], tokenizer)
    assert sft([text | {"prompt": "I am"}], tokenizer) == sft([text], tokenizer)


def test_completion_only_loss_off_learns_the_prompt_too() -> None:
    tokenizer = built("<s> $A")
    record = {"prompt": "I am", "completion": " fine"}
    [both] = sft([record], tokenizer, completion_only_loss=False).examples
    assert both.tokens == answer("I am", " fine", tokenizer).tokens
    assert all(both.response_mask)


# --- prompts, length, and what is said about it ---


def test_prompts() -> None:
    tokenizer = built("<s> $A </s>", "<|im_end|>", CHATML)
    made = prompt_examples(rows({"prompt": "Hello"}, {"prompt": [say("user", "Hello")]}), tokenizer)
    assert [prompt.text for prompt in made.examples] == [
        "Hello",
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert made.examples[0].tokens == tuple(prompt_tokens("Hello", tokenizer))
    assert spelled(made.examples[1].tokens, tokenizer) == made.examples[1].text


def test_a_response_is_cut_at_its_end_and_counted() -> None:
    tokenizer = built("<s> $A")
    records = [{"prompt": "Hello", "chosen": " fine, thank you.", "rejected": " fine"}] * 2
    full = pairs(records, tokenizer).examples[0]
    limit = len(full.chosen) - 2
    made = pairs(records, tokenizer, max_length=limit)
    assert made.examples[0].chosen.tokens == full.chosen.tokens[:limit]
    assert made.examples[0].chosen.response_mask == full.chosen.response_mask[:limit]
    assert made.examples[0].rejected == full.rejected
    assert made.notes == (f"2 of 4 responses were cut at max_length {limit}",)
    assert pairs(records, tokenizer, max_length=len(full.chosen)).notes == ()


def test_a_prompt_may_leave_room_for_one_token_and_not_less() -> None:
    tokenizer = built("<s> $A")
    count = len(prompt_tokens("Hello there", tokenizer))
    record = {"prompt": "Hello there", "completion": ", how"}
    for settings in ({}, {"completion_only_loss": False}):
        [sequence] = sft([record], tokenizer, max_length=count + 1, **settings).examples
        assert len(sequence) == count + 1
        with pytest.raises(OnecardError) as error:
            sft([record], tokenizer, max_length=count, **settings)
        assert str(error.value) == (
            f"x.jsonl:1: prompt longer than max_length: its {count} tokens leave no room for a response in {count}"
        )


def test_empty_responses_and_equal_pairs_are_counted() -> None:
    tokenizer = built("<s> $A")
    made = pairs(
        [
            {"prompt": "Hello", "chosen": " you", "rejected": ""},
            {"prompt": "Hello", "chosen": "", "rejected": " \n"},
            {"prompt": "Hello", "chosen": " you", "rejected": " you"},
        ],
        tokenizer,
    )
    assert len(made.examples) == 3
    assert made.notes == (
        "3 of 6 responses are empty: only their end token is learned",
        "1 of 3 pairs have the same tokens on both sides",
    )


def test_skipped_rows_are_counted_and_the_first_are_named() -> None:
    tokenizer = built("<s> $A")
    good = {"prompt": "Hello", "completion": " you"}
    made = sft([good, *[{"prompt": "Hello", "completion": None}] * 4, good], tokenizer, skip_bad_rows=True)
    assert len(made.examples) == 2
    assert [str(bad) for bad in made.bad_rows] == [f"x.jsonl:{number}: completion is null" for number in (2, 3, 4, 5)]
    assert made.notes == (
        "4 of 6 rows are bad and were skipped: x.jsonl:2: completion is null; x.jsonl:3: completion is null; "
        "x.jsonl:4: completion is null; ...",
    )
    assert not sft([good, *[{"text": None}] * 3], tokenizer, skip_bad_rows=True).notes[0].endswith("...")
    with pytest.raises(OnecardError) as error:
        sft([{"text": None}] * 2, tokenizer, skip_bad_rows=True)
    assert str(error.value) == "none of the 2 rows can be used. x.jsonl:1: text is null"


def test_margins_are_kept() -> None:
    record = {"prompt": "Hello", "chosen": " you", "rejected": " how"}
    made = pairs([record | {"margin": 2}, record], built())
    assert [pair.margin for pair in made.examples] == [2.0, 0.0]
