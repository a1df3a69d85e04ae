"""Chat templates: render messages, set the date that templates write, and find the token that ends an answer.

An example of ChatML: `<|im_end|>` ends an answer, and the line break after it is not part of the answer:

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n    fine<|im_end|>    \\n
    -------------------------- prompt ------------------------    --- answer ---

`template_answers` separates answers from prompts in rendered conversations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from onecard.data.columns import BadRowError, Messages, check_unicode
from onecard.data.readers import reason
from onecard.utils.errors import OnecardError

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})
# Markers: words that templates do not change, and that occur in no other text
QUESTION, ANSWER, CALL = "onecardquestion", "onecardanswer", "onecardcall"
CALL_ID = "onecallid"  # nine letters: Mistral's templates require this length

_date: ContextVar[datetime | None] = ContextVar("template_date", default=None)


# --- rendering ---


def today() -> str:
    """The current date of the clock that chat templates read, as YYYY-MM-DD."""
    from transformers.utils import chat_template_utils

    return str(chat_template_utils.datetime.now().strftime("%Y-%m-%d"))


@contextmanager
def template_date(date: str) -> Iterator[None]:
    """Context in which `date` (YYYY-MM-DD) is the current date for chat templates."""
    token = _date.set(datetime.fromisoformat(date))
    try:
        yield
    finally:
        _date.reset(token)


def date_of(template: str) -> str:
    """The date that a chat template writes, as YYYY-MM-DD; empty if it writes none."""
    date = _date.get()
    return "" if "strftime_now" not in template else today() if date is None else date.strftime("%Y-%m-%d")


@dataclass(frozen=True)
class FixedClock:
    """Replaces the `datetime` class whose `now` transformers' `strftime_now` calls."""

    moment: datetime

    def now(self) -> datetime:
        return self.moment


@contextmanager
def fixed_clock(moment: datetime) -> Iterator[None]:
    """Context in which `strftime_now` of chat templates formats `moment`.

    A template cannot be given another `strftime_now`, so the `datetime` that transformers' own function reads is
    replaced.
    """
    from transformers.utils import chat_template_utils

    original = chat_template_utils.datetime
    chat_template_utils.datetime = FixedClock(moment)
    try:
        yield
    finally:
        chat_template_utils.datetime = original


def rendered(
    messages: Messages,
    tokenizer: Any,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
    *,
    answer_next: bool = False,
) -> str:
    """Messages rendered by the chat template, with its special tokens as text.

    `arguments`: arguments of the template besides the messages, such as `tools`. `answer_next`: add the generation
    prompt. If the template raises an error, it is applied again with "" for each missing content. If it raises again,
    the arguments of tool calls also become JSON strings (DeepSeek-V3). Raises OnecardError if there is no template, and
    BadRowError if the template raises an error each time, or leaves out a message or the tool calls.
    """
    if not tokenizer.chat_template:
        raise OnecardError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template, which rows of chat messages need: use a "
            "model that was tuned for chat, add a chat_template.jinja to its folder, or use rows of plain text."
        )

    def render(messages: Messages) -> str:
        filled = tuple({"content": "", **item} for item in messages)
        variants = (messages, filled, tuple(map(with_json_arguments, filled)))
        errors = []
        for index, variant in enumerate(variants):
            if variant not in variants[:index]:
                try:
                    return apply_template(variant, tokenizer, arguments, answer_next)
                except BadRowError as error:
                    errors.append(error)
        raise errors[0]

    text = render(messages)
    last = len(messages) - 1
    missing = [index for index, item in enumerate(messages) if item.get("content", "").strip() not in text]
    check_written(messages, render, missing if answer_next else [index for index in missing if index == last])
    return check_unicode(text, "chat template")


def with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON strings."""

    def text(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": text(call["function"])}
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} if "arguments" in call else call

    return (
        {**message, "tool_calls": [text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
    )


def apply_template(
    messages: Sequence[dict[str, Any]], tokenizer: Any, arguments: Mapping[str, Any], answer_next: bool
) -> str:
    """`apply_chat_template`, with the date of `template_date`. Raises BadRowError if the template raises."""
    date = _date.get()
    dated = date is not None and "strftime_now" in str(tokenizer.chat_template)
    try:
        with fixed_clock(date) if date is not None and dated else nullcontext():
            return str(
                tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=answer_next, tokenize=False, **arguments
                )
            )
    except Exception as error:  # a template may raise anything, such as that roles must alternate
        raise BadRowError(f"chat template: {reason(error)}") from error


def check_written(messages: Messages, render: Callable[[Messages], str], missing: Sequence[int]) -> None:
    """Raise BadRowError if the template leaves out a message's content, or tool calls.

    Otherwise an empty answer, or an answer to another question, would be learned. To find them in the rendered text,
    contents and calls are replaced by markers. `missing`: indices of messages whose content was not in that text.
    """
    for index in missing:
        marked = {**messages[index], "content": ANSWER}
        if not marked.get("tool_calls") and ANSWER not in render((*messages[:index], marked, *messages[index + 1 :])):
            raise BadRowError(f"chat template: it does not write the content of messages[{index}]")
    calls = sum(len(message.get("tool_calls", ())) for message in messages)
    for key, marker in (("name", CALL), ("id", CALL_ID)) if calls else ():
        marked_messages = tuple(
            {**message, "tool_calls": [with_marker(call, key, marker) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        )
        if render(marked_messages).count(marker) >= calls:
            return
    if calls:
        raise BadRowError("chat template: it does not write the tool calls of the messages")


def with_marker(call: dict[str, Any], key: str, marker: str) -> dict[str, Any]:
    """A tool call with `marker` as its function's `name`, or as its `id`, which some templates write instead (Kimi-K2).

    The name may be under `function`, as in OpenAI's format, or not.
    """
    if key == "name" and "function" in call:
        return {**call, "function": {**call["function"], key: marker}}
    return {**call, key: marker}


# --- end tokens ---


@dataclass(frozen=True)
class EndTokens:
    """The token ids that end an answer. `ids_by_text`: text -> id of these and of all special tokens.

    `closing`: the token that the chat template writes after an answer; None without a template, or if it writes none.
    `chat_ids`: all tokens that the template may write there: it may write another one after tool calls.
    """

    ids: frozenset[int]
    closing: int | None = None
    chat_ids: frozenset[int] = frozenset()
    ids_by_text: Mapping[str, int] = field(default_factory=dict)


def answer_end_tokens(tokenizer: Any) -> EndTokens:
    """The tokens that end an answer.

    These are the tokenizer's EOS, the EOS ids of the model's generation config (`load_tokenizer` stores them on the
    tokenizer as `generation_eos`), and the token that the chat template writes after an answer.
    """
    template = getattr(tokenizer, "chat_template", None)
    eos_ids = frozenset({tokenizer.eos_token_id, *getattr(tokenizer, "generation_eos", ())} - {None})
    return template_end_tokens(tokenizer, str(template), eos_ids) if template else EndTokens(eos_ids)


def closing_token(tokenizer: Any, *, chat: bool) -> int:
    """The end token of training answers: `EndTokens.closing` if `chat` and there is one, else EOS.

    Raises OnecardError if there is no EOS.
    """
    closing = answer_end_tokens(tokenizer).closing if chat else None
    end = tokenizer.eos_token_id if closing is None else closing
    if end is None:
        raise OnecardError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token, so no response could end.")
    return int(end)


@lru_cache(maxsize=8)
def template_end_tokens(tokenizer: Any, template: str, eos_ids: frozenset[int]) -> EndTokens:
    """`answer_end_tokens` of a tokenizer with a template.

    `template` and `eos_ids` are parameters because a tokenizer's may change: they are part of the cache key.
    """
    special = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids_by_text = special | {text: token_id for token_id in eos_ids if (text := tokenizer.decode([token_id]))}
    closing = find_closing_token(tokenizer, eos_ids, ids_by_text)
    if closing is None:
        return EndTokens(eos_ids, ids_by_text=ids_by_text)
    chat_ids = {closing} | {
        token_id for text, token_id in ids_by_text.items() if token_id in eos_ids and text in template
    }
    return EndTokens(eos_ids | {closing}, closing, frozenset(chat_ids), ids_by_text)


def find_closing_token(tokenizer: Any, eos_ids: frozenset[int], ids_by_text: Mapping[str, int]) -> int | None:
    """The first token after an answer that is one of `eos_ids`, or else the first special token; None if there is none.

    Some templates write more after the last answer than after earlier ones (Phi-3: EOS). Only tokens that are written
    after both count, if there are any.
    """
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    for opening in ((question,), ({**question, "role": "system"}, question)):
        last = text_after(ANSWER, (*opening, answer), tokenizer)
        middle = text_after(ANSWER, (*opening, answer, question), tokenizer) or ""
        if last is None:
            continue
        tokens = leading_tokens(last, ids_by_text)
        ends = [token for end, token in tokens if middle.startswith(last[:end])] or [token for _, token in tokens]
        return next((token for token in ends if token in eos_ids), ends[0] if ends else None)
    return None


def text_after(content: str, messages: Messages, tokenizer: Any) -> str | None:
    """The text that the template writes after a message's content; None if it raises or leaves the content out."""
    try:
        _, marker, rest = rendered(messages, tokenizer).rpartition(content)
    except BadRowError:
        return None
    return rest if marker else None


def leading_tokens(text: str, ids_by_text: Mapping[str, int]) -> list[tuple[int, int]]:
    """(end offset, id) of each special token at the start of the text. White space between them is skipped."""
    tokens, offset = list[tuple[int, int]](), 0
    while offset < len(text):
        match = max((token for token in ids_by_text if text.startswith(token, offset)), key=len, default="")
        if match:
            tokens.append((offset + len(match), ids_by_text[match]))
        elif not text[offset].isspace():
            break
        offset += max(len(match), 1)
    return tokens


def trailing_tokens(text: str, ids_by_text: Mapping[str, int]) -> list[tuple[int, int]]:
    """(end offset, id) of each special token at the end of the text, in text order."""
    tokens, offset, all_texts = list[tuple[int, int]](), len(text), tuple(ids_by_text)
    while offset:
        match = ""
        if text.endswith(all_texts, 0, offset):
            match = max((token for token in ids_by_text if text.endswith(token, 0, offset)), key=len)
            tokens.append((offset, ids_by_text[match]))
        elif not text[offset - 1].isspace():
            break
        offset -= max(len(match), 1)
    return tokens[::-1]


def cut_after_end_token(text: str, tokenizer: Any) -> tuple[str, int | None]:
    """(text up to the end token of its last turn, that token) of a rendered text; (all text, None) without one."""
    ends = answer_end_tokens(tokenizer)
    tail = trailing_tokens(text, ends.ids_by_text)
    offset, end = next(((offset, token) for offset, token in tail if token in ends.ids), (len(text), None))
    return text[:offset], end
