"""Every bad row is one line that says which row it is and what is wrong with it."""

from typing import Any

import pytest

from onecard.data import preference_examples, prompt_examples
from onecard.utils.errors import OnecardError
from tests.engine import data_material
from tests.engine.data_material import BOT, CHATML, USER, rows, say
from tests.engine.template_material import byte_tokenizer

BEGINS = CHATML.replace("assistant\n{% endif %}", "assistant\nSure, {% endif %}")
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system\nhere') }}{% endif %}" + CHATML


def tokenizer(template: str = CHATML) -> Any:
    return byte_tokenizer(template, "<|im_end|>")


def sft(*records: dict[str, Any], template: str = CHATML) -> Any:
    return data_material.sft(records, tokenizer(template))


BAD_SFT = {
    "nothing known": (
        {"label": 0, "sentence": "a"},
        "no column 'messages', 'prompt' + 'completion', or 'text'; there are label, sentence.",
    ),
    "misspelt": (
        {"txt": "a"},
        "no column 'messages', 'prompt' + 'completion', or 'text'; there are txt. Did you mean 'txt'?",
    ),
    "empty row": ({}, "no column 'messages', 'prompt' + 'completion', or 'text'; the row is empty."),
    "half": (
        {"prompt": "a", "completions": "b"},
        "no column 'completion'; there are prompt, completions. Did you mean 'completions'?",
    ),
    "other half": ({"completion": "b"}, "no column 'prompt'; there are completion."),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "no column 'completion'; there are prompt, chosen, rejected.",
    ),
    "null": ({"text": None}, "text is null"),
    "every kind null": (
        {"messages": None, "prompt": None, "completion": None, "text": None},
        "messages, prompt, completion, text are null",
    ),
    "every kind null beside others": (
        {"messages": None, "text": None, "chosen": None, "source": "a", "txt": "b"},
        "messages, text are null; there are source, txt.",
    ),
    "null and nothing known": (
        {"txt": None, "source": None},
        "no column 'messages', 'prompt' + 'completion', or 'text'; every column is null (txt, source).",
    ),
    "half, the rest null": (
        {"messages": None, "prompt": "a", "completion": None, "text": None},
        "completion is null",
    ),
    "other half, the rest null": ({"text": None, "completion": "b"}, "no column 'prompt'; there are completion."),
    "NaN": ({"text": float("nan")}, "text: expected text or a list of messages, got NaN"),
    "number": ({"text": 3}, "text: expected text or a list of messages, got a number"),
    "truth": ({"text": True}, "text: expected text or a list of messages, got true or false"),
    "messages in text": (
        {"text": [USER]},
        "text: expected text, got a list; a list of messages belongs in 'messages'",
    ),
    "text in messages": ({"messages": "a"}, "messages: expected a list of messages, got text"),
    "no messages": ({"messages": []}, "messages: the list of messages is empty"),
    "message is text": (
        {"messages": [USER, "fine"]},
        "messages[1]: expected an object with role and content, got text",
    ),
    "ShareGPT": (
        {"messages": [{"from": "human", "value": "a"}]},
        "messages[0]: no 'role'; there are from, value",
    ),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "messages[1]: no 'content'; there are role"),
    "null content": ({"messages": [USER, say("assistant", None)]}, "messages[1]: content is null"),
    "content in parts": (
        {"messages": [say("user", [{"type": "text"}])]},
        "messages[0]: content: expected text, got a list",
    ),
    "unknown role": (
        {"messages": [USER, say("asistant", "a")]},
        "messages[1]: unknown role 'asistant'; expected one of system, developer, user, assistant, tool. "
        "Did you mean 'assistant'?",
    ),
    "nobody answers": ({"messages": [USER]}, "messages: no message of the assistant; expected one or more to learn"),
    "answer first": (
        {"messages": [BOT, USER, BOT]},
        "messages: the first message is the assistant's; expected a prompt before it",
    ),
    "mixed": ({"prompt": "a", "completion": [BOT]}, "completion is messages but prompt is text"),
    "mixed the other way": ({"prompt": [USER], "completion": "a"}, "completion is text but prompt is messages"),
    "prompt ends with an answer": (
        {"prompt": [USER, BOT], "completion": [BOT]},
        "prompt: its last message is the assistant's; expected a message to answer",
    ),
    "completion by the user": (
        {"prompt": [USER], "completion": [BOT, USER]},
        "completion: expected an assistant's message first and last, got assistant, user",
    ),
    "half a surrogate": ({"text": "ab\ud800"}, "text: not valid Unicode at character 3"),
    "half a surrogate in chat": (
        {"messages": [say("user", "\udfff")]},
        "messages[0]: not valid Unicode at character 1",
    ),
    "nothing to predict": ({"text": ""}, "nothing to learn: expected a response token with a token before it"),
    "nothing at all": (
        {"prompt": "", "completion": ""},
        "nothing to learn: expected a response token with a token before it",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD_SFT.values(), ids=BAD_SFT)
def test_bad_sft_rows(record: dict[str, Any], message: str) -> None:
    with pytest.raises(OnecardError) as error:
        sft({"prompt": "a", "completion": "b"}, record)
    assert str(error.value) == f"x.jsonl:2: {message}"


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD_PAIRS = {
    "no prompt": ({"chosen": "b", "rejected": "c"}, "no column 'prompt'; there are chosen, rejected."),
    "misspelt prompt": (
        {"promt": "a", "chosen": "b", "rejected": "c"},
        "no column 'prompt'; there are promt, chosen, rejected. Did you mean 'promt'?",
    ),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "no column 'rejected'; there are prompt, chosen."),
    "null rejected": (PAIR | {"rejected": None}, "rejected is null"),
    "null prompt": (PAIR | {"prompt": None}, "prompt is null"),
    "object": (PAIR | {"chosen": {"a": 1}}, "chosen: expected text or a list of messages, got an object"),
    "mixed": (PAIR | {"rejected": [BOT]}, "rejected is messages but chosen is text"),
    "chat prompt, text answers": (PAIR | {"prompt": [USER]}, "chosen is text but prompt is messages"),
    "nothing shared": (
        {"chosen": [BOT], "rejected": [BOT]},
        "no prompt: expected messages in 'prompt', or chosen and rejected that begin with the same message",
    ),
    "text margin": (PAIR | {"margin": "2"}, "margin: expected a number, got text"),
    "truth as margin": (PAIR | {"margin": True}, "margin: expected a number, got true or false"),
    "nan margin": (PAIR | {"margin": float("nan")}, "margin: expected a finite number, got nan"),
    "endless margin": (PAIR | {"margin": float("-inf")}, "margin: expected a finite number, got -inf"),
    "huge margin": (PAIR | {"margin": 10**400}, "margin: expected a finite number, got inf"),
}


@pytest.mark.parametrize(("record", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs(record: dict[str, Any], message: str) -> None:
    with pytest.raises(OnecardError) as error:
        preference_examples(rows(PAIR, record), tokenizer(), max_length=64, skip_bad_rows=False)
    assert str(error.value) == f"x.jsonl:2: {message}"


BAD_PROMPTS = {
    "missing": ({"promts": "a"}, "no column 'prompt'; there are promts. Did you mean 'promts'?"),
    "null": ({"prompt": None}, "prompt is null"),
    "no tokens": ({"prompt": ""}, "prompt: it has no tokens; expected one or more"),
    "answered already": (
        {"prompt": [USER, BOT]},
        "prompt: its last message is the assistant's; expected a message to answer",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts(record: dict[str, Any], message: str) -> None:
    with pytest.raises(OnecardError) as error:
        prompt_examples(rows({"prompt": "a"}, record), tokenizer())
    assert str(error.value) == f"x.jsonl:2: {message}"


BAD_TEMPLATES = {
    "begins answers that the row does not": (
        BEGINS,
        [USER, BOT],
        "chat template: messages[1] does not follow the prompt, which ends in 'rt|>assistant\\nSure, ', "
        "so the answer cannot be separated from it",
    ),
    "leaves the content out": (
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' else '' }}"),
        [USER, BOT],
        "chat template: it does not write the content of messages[1]",
    ),
    "refuses": (STRICT, [say("system", "a"), USER, BOT], "chat template: No system"),
}


@pytest.mark.parametrize(("template", "messages", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_templates_that_do_not_fit_the_row(template: str, messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(OnecardError) as error:
        sft({"messages": messages}, template=template)
    assert str(error.value) == f"x.jsonl:1: {message}"
