"""Tokens and masks: what a response is, to the token, on tokenizers that disagree about everything around it."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onecard.batches import TokenSequence
from onecard.data import (
    Row,
    load_rows,
    preference_examples,
    prompt_examples,
    prompt_tokens,
    sft_examples,
)
from onecard.errors import OnecardError

REAL = Path(__file__).parents[2].parent / "shared" / "data"
SENTENCES = ["Hello there, how are you today?", "user assistant system tool", "I am fine, thank you.\n\nAnd you?"] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (  # no special token at all, and a border inside a word: "Bot:" + " hi"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def real(name: str) -> Any:
    path = REAL / "models" / name
    if not path.exists():
        pytest.skip(f"no tokenizer at {path}")
    return AutoTokenizer.from_pretrained(path)


def real_rows(name: str) -> list[Row]:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    return load_rows(str(path), split="train")


@cache
def built(form: str = "$A", eos: str = "</s>", template: str | None = None) -> Any:
    """Byte-level BPE; `form` is what the tokenizer makes of a text, such as `<s> $A </s>`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    if form != "$A":
        core.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[(token, core.token_to_id(token)) for token in special]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, name_or_path="built")
    wrapped.chat_template = template
    return wrapped


def all_tokenizers() -> Iterator[Any]:
    for name in ("TinyStories-656K", "stories260K"):
        yield pytest.param(lambda name=name: real(name), id=name)
    for form, eos in (
        ("$A", "</s>"),
        ("<s> $A", "</s>"),
        ("<s> $A </s>", "</s>"),
        ("$A </s>", "</s>"),
        ("<s> $A", "<s>"),
        ("<s> $A <s>", "<s>"),
    ):
        yield pytest.param(lambda form=form, eos=eos: built(form, eos), id=f"{form} eos={eos}")


every_tokenizer = pytest.mark.parametrize("make", list(all_tokenizers()))


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row("x.jsonl", number, record) for number, record in enumerate(records, start=1)]


def sft(records: Sequence[dict[str, Any]], tokenizer: Any, **settings: Any) -> Any:
    defaults = {
        "max_length": 64,
        "completion_only_loss": True,
        "assistant_only_loss": True,
        "skip_bad_rows": False,
    }
    return sft_examples(rows(*records), tokenizer, **{**defaults, **settings})


def pairs(records: Sequence[dict[str, Any]], tokenizer: Any, max_length: int = 64, skip_bad_rows: bool = False) -> Any:
    return preference_examples(rows(*records), tokenizer, max_length=max_length, skip_bad_rows=skip_bad_rows)


def answer(prompt: Any, completion: Any, tokenizer: Any) -> TokenSequence:
    [sequence] = sft([{"prompt": prompt, "completion": completion}], tokenizer, max_length=1000).examples
    return sequence


def split(sequence: TokenSequence) -> tuple[list[int], list[int]]:
    """Prompt and response ids; the mask must be off before the border and on behind it."""
    border = sequence.response_mask.index(True)
    assert sequence.response_mask == (False,) * border + (True,) * (len(sequence) - border)
    return list(sequence.tokens[:border]), list(sequence.tokens[border:])


def spelled(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, BOT = say("user", "Hello"), say("assistant", "fine")


# --- text ---

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
def test_prompt_is_what_generation_feeds_and_the_response_ends_once(make: Any, prompt: str, response: str) -> None:
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


# --- chat ---


def test_chat_template_is_applied_once_and_answers_end_at_the_eos() -> None:
    tokenizer = built("<s> $A </s>", "<|im_end|>", CHATML)
    prompt = [say("system", "I am fine"), say("user", "Hello")]
    fed = prompt_tokens(prompt, tokenizer)
    assert fed == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    before, after = split(answer(prompt, [say("assistant", "fine")], tokenizer))
    assert before == fed
    assert spelled(after, tokenizer) == "fine<|im_end|>"  # the template's line break is never generated
    assert tokenizer.bos_token_id not in before


def test_a_template_without_eos_gets_one_and_a_border_inside_a_word_is_kept() -> None:
    tokenizer = built("<s> $A", "</s>", PLAIN)
    prompt = [say("user", "Hello")]
    fed = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    whole = tokenizer("user: Hello\nassistant: fine", add_special_tokens=False)["input_ids"]
    assert whole[: len(fed)] != fed  # " fine" is one token, of which the prompt has the space
    before, after = split(answer(prompt, [say("assistant", "fine")], tokenizer))
    assert before == fed
    assert spelled(after, tokenizer) == "fine\n</s>"


def test_every_assistant_turn_is_learned_through_its_eos() -> None:
    tokenizer = built("$A", "<|im_end|>", CHATML)
    messages = [
        say("user", "Hello"),
        say("assistant", "fine"),
        say("user", "And you?"),
        say("assistant", "thank you"),
        say("user", "Hello"),  # behind the last answer: nothing to learn
    ]
    [sequence] = sft([{"messages": messages}], tokenizer).examples
    whole = tokenizer.apply_chat_template(messages[:4], tokenize=True, return_dict=False)
    assert list(sequence.tokens) == whole[: len(sequence)]
    assert spelled(whole[len(sequence) :], tokenizer) == "\n"
    learned = [token for token, flag in zip(sequence.tokens, sequence.response_mask, strict=True) if flag]
    assert spelled(learned, tokenizer) == "fine<|im_end|>thank you<|im_end|>"
    [everything] = sft([{"messages": messages[:4]}], tokenizer, assistant_only_loss=False).examples
    assert everything.tokens == sequence.tokens
    assert all(everything.response_mask)


def test_a_template_without_eos_gets_one_behind_the_last_turn_only() -> None:
    tokenizer = built("$A", "</s>", PLAIN)
    [sequence] = sft([{"messages": [USER, BOT, USER, BOT]}], tokenizer).examples
    assert spelled(sequence.tokens, tokenizer) == "user: Hello\nassistant: fine\n" * 2 + "</s>"
    learned = [token for token, flag in zip(sequence.tokens, sequence.response_mask, strict=True) if flag]
    assert spelled(learned, tokenizer) == "fine\nfine\n</s>"


def test_tools_inside_a_completion_are_not_learned() -> None:
    tokenizer = built("$A", "<|im_end|>", CHATML)
    completion = [say("assistant", "how"), say("tool", "today"), say("assistant", "fine")]
    sequence = answer([say("user", "Hello")], completion, tokenizer)
    learned = [token for token, flag in zip(sequence.tokens, sequence.response_mask, strict=True) if flag]
    assert spelled(learned, tokenizer) == "how<|im_end|>fine<|im_end|>"


@pytest.mark.parametrize("with_text_prompt", [False, True])
def test_the_prompt_that_chat_answers_share(with_text_prompt: bool) -> None:
    tokenizer = built("$A", "<|im_end|>", CHATML)
    prompt = [say("system", "I am fine"), say("user", "Hello")]
    good, bad = [say("assistant", "thank you")], [say("assistant", "how")]
    explicit = pairs([{"prompt": prompt, "chosen": good, "rejected": bad}], tokenizer)
    record = {"chosen": prompt + good, "rejected": prompt + bad} | ({"prompt": "Hello"} if with_text_prompt else {})
    assert pairs([record], tokenizer) == explicit
    before, after = split(explicit.examples[0].rejected)
    assert before == prompt_tokens(prompt, tokenizer)
    assert spelled(after, tokenizer) == "how<|im_end|>"
    # of an identical pair the last message is the answer, not all of it the prompt
    same = pairs([{"chosen": prompt + good, "rejected": prompt + good}], tokenizer)
    assert same.examples[0].chosen == explicit.examples[0].chosen
    assert same.notes == ("1 of 1 pairs have the same tokens on both sides",)


def test_null_entries_of_messages_do_not_reach_the_template() -> None:
    """Parquet gives every message the keys of all; a template that asks `is defined` must not find a null."""
    name = "{% if messages[0].name is defined %}{{ messages[0].name }}{% endif %}"
    tokenizer = built("$A", "<|im_end|>", CHATML + name)
    messages = [[say("user", "Hello", name=None)], [say("user", "Hello", name="you")]]
    made = prompt_examples(rows(*({"prompt": prompt} for prompt in messages)), tokenizer).examples
    assert [prompt.text.rpartition("assistant\n")[2] for prompt in made] == ["", "you"]


def test_prompts() -> None:
    tokenizer = built("<s> $A </s>", "<|im_end|>", CHATML)
    made = prompt_examples(rows({"prompt": "Hello"}, {"prompt": [say("user", "Hello")]}), tokenizer)
    assert [prompt.text for prompt in made.examples] == [
        "Hello",
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert made.examples[0].tokens == tuple(prompt_tokens("Hello", tokenizer))
    assert spelled(made.examples[1].tokens, tokenizer) == made.examples[1].text


def test_no_chat_template_is_an_error_that_no_skipping_hides() -> None:
    with pytest.raises(OnecardError) as error:
        sft([{"messages": [say("user", "a"), say("assistant", "b")]}], built(), skip_bad_rows=True)
    assert str(error.value).startswith("the tokenizer 'built' has no chat template, which rows of chat messages need: ")


# --- length, and what is said about it ---


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


def test_empty_responses_and_identical_pairs_are_counted_and_kept() -> None:
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
        "3 of 6 responses are empty: only their end is learned",
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
