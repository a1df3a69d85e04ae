"""What is cut where a row is longer than max_length, and what is said about it. `<s>` is the special token in front."""

from typing import Any

import pytest

from onecard.data import (
    labelled_examples,
    preference_examples,
    prompt_examples,
    prompt_tokens,
    ranking_examples,
    scored_examples,
)
from onecard.utils.errors import OnecardError
from tests.engine.data_material import CHATML, answer, built, real, rows, say, sft, spelled, split

TOKENIZER = built("<s> $A")
PROMPT, SHORT, LONG = "Hello there, how are", " you", " you today? I am fine, thank you."
WHOLE = answer(PROMPT, LONG, TOKENIZER)
BEFORE, AFTER = split(WHOLE)


def fit(completion: str, max_length: int, mode: str, tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    record = {"prompt": PROMPT, "completion": completion}
    return sft([record], tokenizer, max_length=max_length, truncation_mode=mode, **settings)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "error"])
def test_what_fits_is_left_alone(mode: str) -> None:
    made = fit(LONG, len(WHOLE), mode)
    assert made.examples == (WHOLE,)
    assert made.notes == ()


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_keep_end_takes_the_prompts_beginning_behind_the_bos(lost: int) -> None:
    limit = len(WHOLE) - lost
    made = fit(LONG, limit, "keep_end")
    assert split(made.examples[0]) == ([BEFORE[0], *BEFORE[1 + lost :]], AFTER)
    assert made.notes == ("1 of 1 prompts were cut at their beginning",)
    start = fit(LONG, limit, "keep_start")
    assert split(start.examples[0]) == (BEFORE, AFTER[:-lost])
    assert start.notes == (f"1 of 1 responses were cut at max_length {limit}",)


def test_keep_end_cuts_a_response_that_is_too_long_alone() -> None:
    limit = len(AFTER) - 2
    made = fit(LONG, limit, "keep_end")
    assert split(made.examples[0]) == ([BEFORE[0]], AFTER[: limit - 1])
    assert made.notes == (
        "1 of 1 prompts were cut at their beginning",
        f"1 of 1 responses were cut at max_length {limit}",
    )


def test_keep_end_leaves_one_token_before_the_response() -> None:
    """Without a BOS, it is the prompt's last."""
    tokenizer = built()
    before, after = split(answer(PROMPT, LONG, tokenizer))
    made = fit(LONG, len(after) - 1, "keep_end", tokenizer)
    assert split(made.examples[0]) == (before[-1:], after[:-2])


def test_keep_end_takes_a_prompt_that_is_longer_than_max_length() -> None:
    with pytest.raises(OnecardError, match=f"prompt longer than max_length: its {len(BEFORE)} tokens leave no room"):
        fit(SHORT, 4, "keep_start")
    short = split(answer(PROMPT, SHORT, TOKENIZER))[1]
    room = 4 - len(short)
    assert split(fit(SHORT, 4, "keep_end").examples[0]) == ([BEFORE[0], *BEFORE[1 - room :]], short)


def test_an_empty_prompt_has_nothing_to_lose() -> None:
    tokenizer = built()
    record = {"prompt": "", "completion": LONG}
    [made] = sft([record], tokenizer, max_length=4, truncation_mode="keep_end").examples
    assert made.tokens == answer("", LONG, tokenizer).tokens[:4]


def test_error_names_the_row() -> None:
    limit = len(WHOLE) - 1
    with pytest.raises(OnecardError) as error:
        fit(LONG, limit, "error")
    assert str(error.value) == f"x.jsonl:1: {len(WHOLE)} tokens, expected at most {limit} (max_length)"
    records = [{"prompt": PROMPT, "completion": text} for text in (SHORT, LONG)]
    made = sft(records, TOKENIZER, max_length=limit, truncation_mode="error", skip_bad_rows=True)
    assert (len(made.examples), len(made.bad_rows)) == (1, 1)


def test_a_prompt_that_is_learned_too_is_cut_alike() -> None:
    for mode in ("keep_start", "keep_end"):
        [only] = fit(LONG, len(WHOLE) - 3, mode).examples
        [both] = fit(LONG, len(WHOLE) - 3, mode, completion_only_loss=False).examples
        assert both.tokens == only.tokens
        assert all(both.response_mask)
    with pytest.raises(OnecardError, match="leave no room for a response"):
        fit(SHORT, len(BEFORE), "keep_start", completion_only_loss=False)


def test_texts_are_cut_at_their_end_in_both_modes() -> None:
    for mode in ("keep_start", "keep_end"):
        [text] = sft([{"text": PROMPT + LONG}], TOKENIZER, max_length=8, truncation_mode=mode).examples
        assert list(text.tokens) == prompt_tokens(PROMPT + LONG, TOKENIZER)[:8]
    with pytest.raises(OnecardError, match="tokens, expected at most 8"):
        sft([{"text": PROMPT + LONG}], TOKENIZER, max_length=8, truncation_mode="error")


@pytest.mark.parametrize("first", [0, 1])
def test_all_answers_to_a_prompt_keep_the_same_of_it(first: int) -> None:
    """The longest answer decides, whichever it is."""
    texts = (SHORT, LONG) if first == 0 else (LONG, SHORT)
    limit, expected = len(WHOLE) - 2, [BEFORE[0], *BEFORE[3:]]
    settings: dict[str, Any] = {"max_length": limit, "truncation_mode": "keep_end", "skip_bad_rows": False}
    pairs = preference_examples(
        rows({"prompt": PROMPT, "chosen": texts[0], "rejected": texts[1]}), TOKENIZER, **settings
    )
    rankings = ranking_examples(rows({"prompt": PROMPT, "completions": [" a", *texts]}), TOKENIZER, **settings)
    for sequence in (pairs.examples[0].chosen, pairs.examples[0].rejected, *rankings.examples[0].sequences):
        assert split(sequence)[0] == expected
    assert split(rankings.examples[0].sequences[1 + 1 - first])[1] == AFTER
    for made in (pairs, rankings):
        assert made.notes == ("1 of 1 prompts were cut at their beginning",)


def test_scores_and_labels_are_cut_as_completions_are() -> None:
    limit = len(WHOLE) - 2
    settings: dict[str, Any] = {"max_length": limit, "truncation_mode": "keep_end", "skip_bad_rows": False}
    [expected] = fit(LONG, limit, "keep_end").examples
    record = {"prompt": PROMPT, "completion": LONG, "score": 1.0, "label": True}
    other = {"prompt": "I am", "completion": SHORT, "score": 1.0, "label": False}
    assert scored_examples(rows(record), TOKENIZER, **settings).examples[0].sequence == expected
    labelled = labelled_examples(rows(record, other), TOKENIZER, **settings)
    assert labelled.examples[0].sequence == expected
    assert labelled.examples[0].mismatched == answer(PROMPT, SHORT, TOKENIZER)
    assert labelled.notes == ("1 of 2 prompts were cut at their beginning",)


def test_a_mismatched_answer_that_is_too_long_is_cut() -> None:
    long = {"prompt": "I am", "completion": LONG, "label": True}
    asks = {"prompt": PROMPT, "completion": SHORT, "label": False}
    limit = len(answer("I am", LONG, TOKENIZER))
    assert limit < len(WHOLE)
    made = labelled_examples(
        rows(asks, long), TOKENIZER, max_length=limit, truncation_mode="error", skip_bad_rows=False
    )
    assert made.examples[0].mismatched.tokens == WHOLE.tokens[:limit]
    assert made.notes == ()


def test_chat_prompts_are_cut_behind_the_bos() -> None:
    tokenizer = built("$A", "<|im_end|>", CHATML)
    record = {"prompt": [say("user", PROMPT)], "completion": [say("assistant", LONG)]}
    before, after = split(answer(record["prompt"], record["completion"], tokenizer))
    [made] = sft([record], tokenizer, max_length=len(before) + len(after) - 4, truncation_mode="keep_end").examples
    assert split(made) == (before[4:], after)
    opened = built("<s> $A", "<|im_end|>", "<s>" + CHATML)
    before, after = split(answer(record["prompt"], record["completion"], opened))
    [made] = sft([record], opened, max_length=len(before) + len(after) - 4, truncation_mode="keep_end").examples
    assert split(made) == ([opened.bos_token_id, *before[5:]], after)


def test_prompts_to_answer() -> None:
    tokenizer = real("TinyStories-656K")
    text = "Once upon a time there was a little girl who liked to play"
    tokens = prompt_tokens(text, tokenizer)
    limit = len(tokens) - 3
    for mode in ("keep_start", "error"):
        with pytest.raises(OnecardError) as error:
            prompt_examples(rows({"prompt": text}), tokenizer, max_length=limit, truncation_mode=mode)
        assert (
            str(error.value)
            == f"x.jsonl:1: prompt: {len(tokens)} tokens, expected at most {limit}, so that the response has room"
        )
    made = prompt_examples(
        rows({"prompt": text}, {"prompt": "Lily"}), tokenizer, max_length=limit, truncation_mode="keep_end"
    )
    assert made.examples[0].tokens == (tokens[0], *tokens[4:])
    assert made.examples[0].text == text
    assert made.notes == ("1 of 2 prompts were cut at their beginning",)
    assert spelled(made.examples[0].tokens[1:], tokenizer).endswith("liked to play")
    with pytest.raises(OnecardError, match="expected at most 1, so that"):
        prompt_examples(rows({"prompt": text}), tokenizer, max_length=1, truncation_mode="keep_end")
