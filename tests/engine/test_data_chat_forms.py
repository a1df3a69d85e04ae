"""Messages and chat templates that were silently misread, or refused though they are right."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onecard.data.template_answers import as_content
from onecard.data.templates import rendered
from onecard.utils.errors import OnecardError
from tests.engine.data_material import CHATML, sft
from tests.engine.template_material import IM, byte_tokenizer, marked

TOOLED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "A"}}}
ASKED = {"role": "user", "content": "W?"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tokenizer_with(template: str) -> Any:
    end = "<|im_end|>" if "<|im_end|>" in template else "</s>"
    return byte_tokenizer(template, end, IM, [end])


def learned(template: str, messages: list[dict[str, Any]], **columns: Any) -> tuple[str, tuple[str, ...]]:
    """The text of a row with what is learned in [[ ]], and what is said of the rows."""
    tokenizer = tokenizer_with(template)
    found = sft([{"messages": messages, **columns}], tokenizer, max_length=4096)
    return marked(found.examples[0], tokenizer), found.notes


# --- tool calls


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [{**CALL, "function": {"name": "weather", "arguments": '{"city": "A"}'}}],
        [{**CALL, "id": None, "function": {**CALL["function"], "strict": None}}],
    ],
    ids=["objects", "JSON text", "arguments as JSON text", "null keys"],
)
def test_tool_calls_in_every_form_are_the_same(calls):
    text, _ = learned(TOOLED, [ASKED, said(None, tool_calls=calls)])
    assert text.endswith('[[<call>weather {"city": "A"}</call><|im_end|>]]')


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tool_calls": "call weather"}, r"messages\[1\]: tool_calls: not JSON"),
        ({"tool_calls": {"name": "f"}}, r"messages\[1\]: tool_calls: expected a list of calls, got an object"),
        ({"tool_calls": ["weather"]}, r"tool_calls\[0\]: expected an object with the name of a function, got text"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, r"tool_calls\[0\]: expected an object with the name"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, r"arguments: expected an object, got a list"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, r"function_call is deprecated"),
    ],
)
def test_calls_that_are_none_are_a_bad_row(more, message):
    with pytest.raises(OnecardError, match=message):
        learned(TOOLED, [ASKED, said("", **more)])


def test_a_template_that_joins_arguments_gets_them_as_text():
    """As DeepSeek-V3's does."""
    joined = TOOLED.replace("c.function.arguments | tojson", "'```' + c.function.arguments + '```'")
    text, _ = learned(joined, [ASKED, said("", tool_calls=[CALL])])
    assert text.endswith('[[<call>weather ```{"city": "A"}```</call><|im_end|>]]')


def test_a_template_may_write_a_call_by_its_id():
    """As Kimi-K2's does; and Mistral's asks for ids of nine letters."""
    by_id = TOOLED.replace("c.function.name", "c.id")
    text, _ = learned(by_id, [ASKED, said("", tool_calls=[{**CALL, "id": "functions.weather:0"}])])
    assert "[[<call>functions.weather:0" in text
    strict = TOOLED.replace("<call>", "{% if c.id | length != 9 %}{{ raise_exception('9 letters') }}{% endif %}<call>")
    assert "[[<call>weather" in learned(strict, [ASKED, said("", tool_calls=[{**CALL, "id": "abcdef123"}])])[0]


def test_empty_tools_are_none():
    assert learned(TOOLED, [user("a"), said("b")], tools="") == learned(TOOLED, [user("a"), said("b")])


# --- messages that a template leaves out


@pytest.mark.parametrize("role", ["developer", "system"])
def test_a_message_that_the_template_leaves_out_is_a_bad_row(role):
    template = CHATML.replace("{% for m in messages %}", f"{{% for m in messages if m['role'] != '{role}' %}}")
    assert template != CHATML
    with pytest.raises(OnecardError, match=r"does not write the content of messages\[0\]"):
        learned(template, [{"role": role, "content": "Be brief."}, user("a"), said("b")])


def test_thoughts_that_the_template_does_not_write_are_said():
    _, notes = learned(CHATML, [user("2+2?"), said("4", reasoning_content="two and two")])
    assert "1 of 1 rows have reasoning in a key of its own, which the chat template does not write" in notes
    assert not learned(CHATML, [user("2+2?"), said("4")])[1]


MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_what_is_written_only_in_the_prompt_is_learned_behind():
    """Mistral v0.3 writes the system message before the last user's, while that is the last."""
    system = {"role": "system", "content": "Be brief."}
    text, _ = learned(MISTRAL, [system, user("Hi"), said("Hello.")])
    assert text == "[INST] Be brief.\n\nHi[/INST][[ Hello.</s>]]"
    text, notes = learned(MISTRAL, [system, user("Hi"), said("Hello."), user("Bye"), said("Till then.")])
    assert text == "[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nBye[/INST][[ Till then.</s>]]"
    assert any(note.startswith("1 of 2 answers are left out") for note in notes)


# --- thoughts

OPENED = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
CLOSED = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n</think>{% endif %}")


def test_an_unclosed_thought_goes_on_from_the_opened_one():
    """As of rejected answers that ran out of tokens."""
    assert OPENED != CHATML
    text, _ = learned(OPENED, [user("Hi"), said("<think>\nHm, let me")])
    assert text.endswith("<think>\n[[Hm, let me<|im_end|>]]")


@pytest.mark.parametrize("more", [{"content": "<think>Hm.</think>Hello."}, {"reasoning_content": "Hm."}])
def test_behind_a_closed_thought_there_is_none(more):
    """DeepSeek-V3.1 with thinking off."""
    with pytest.raises(OnecardError, match=r"the prompt ends in closed reasoning, but messages\[1\] has its own"):
        learned(CLOSED, [user("Hi"), {**said("Hello."), **more}])


def test_an_answer_cut_out_of_tags_is_learned_whole():
    cutting = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('<answer>')[-1].split('</answer>')[0] }}")
    assert cutting != CHATML
    text, _ = learned(cutting, [user("q"), said("<think>\nhm\n</think>\n<answer>\nyes\n</answer>")])
    assert text.endswith("[[<think>\nhm\n</think>\n<answer>\nyes\n</answer><|im_end|>]]")


# --- answers as messages


@pytest.mark.parametrize("template", [MISTRAL, CHATML])
@pytest.mark.parametrize("answer", [" Tom.", "Tom.", "  Tom.", " "])
def test_an_answer_as_a_message_is_written_as_it_was_sampled(template, answer):
    tokenizer, asked = tokenizer_with(template), (user("Hi"),)
    message = said(as_content(answer, asked, tokenizer))
    prompt = rendered(asked, tokenizer, answer_next=True)
    written = rendered((*asked, message), tokenizer)
    if template == CHATML or answer.startswith(" "):
        assert written.startswith(prompt + answer)
