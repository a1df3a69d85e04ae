"""Chats: the template applied once, turns masked one by one, special tokens never doubled."""

import pytest

from onecard.data import prompt_examples, prompt_tokens
from onecard.utils.errors import OnecardError
from tests.engine.data_material import CHATML, PLAIN, answer, built, pairs, rows, say, sft, spelled, split


def test_the_template_is_applied_once_and_answers_end_at_eos() -> None:
    tokenizer = built("<s> $A </s>", "<|im_end|>", CHATML)
    prompt = [say("system", "I am fine"), say("user", "Hello")]
    fed = prompt_tokens(prompt, tokenizer)
    assert fed == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    before, after = split(answer(prompt, [say("assistant", "fine")], tokenizer))
    assert before == fed
    assert spelled(after, tokenizer) == "fine<|im_end|>"  # the template's line break is never generated
    assert tokenizer.bos_token_id not in before


def test_a_template_without_eos_gets_one() -> None:
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


def test_no_chat_template_is_an_error_that_no_skipping_hides() -> None:
    with pytest.raises(OnecardError) as error:
        sft([{"messages": [say("user", "a"), say("assistant", "b")]}], built(), skip_bad_rows=True)
    assert str(error.value).startswith("the tokenizer 'built' has no chat template, which rows of chat messages need: ")
