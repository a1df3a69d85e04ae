"""Chat templates: messages to text, the date that they write, and the token that ends an answer.

A worked example of ChatML, where `<|im_end|>` ends an answer and the line break behind it is no part of it:

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n    fine<|im_end|>    \\n
    -------------------------- prompt ------------------------    --- answer ---

`template_answers` has what of a rendered conversation is an answer.
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

from onecard.data.columns import BadRowError, Messages, unicode
from onecard.data.readers import reason
from onecard.utils.errors import OnecardError

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})
QUESTION, ANSWER, CALL = "onecardquestion", "onecardanswer", "onecardcall"  # letters, which no template changes
CALL_ID = "onecallid"  # of nine letters, which Mistral's templates ask for

_date: ContextVar[datetime | None] = ContextVar("template_date", default=None)


# --- rendering ---


def today() -> str:
    """The date of the clock that chat templates read, as YYYY-MM-DD."""
    from transformers.utils import chat_template_utils

    return str(chat_template_utils.datetime.now().strftime("%Y-%m-%d"))


@contextmanager
def template_date(date: str) -> Iterator[None]:
    """Inside, `date` (YYYY-MM-DD) is the current date of every chat template that writes one."""
    token = _date.set(datetime.fromisoformat(date))
    try:
        yield
    finally:
        _date.reset(token)


def date_of(template: str) -> str:
    """The date that a chat template writes, as YYYY-MM-DD; empty where it writes none."""
    date = _date.get()
    return "" if "strftime_now" not in template else today() if date is None else date.strftime("%Y-%m-%d")


@dataclass(frozen=True)
class FixedClock:
    """Stands for the `datetime` class of which transformers' `strftime_now` takes `now`."""

    moment: datetime

    def now(self) -> datetime:
        return self.moment


@contextmanager
def fixed_clock(moment: datetime) -> Iterator[None]:
    """Inside, `strftime_now` of chat templates formats `moment`. Templates are given no functions, so the clock that
    transformers' own function reads is exchanged.
    """
    from transformers.utils import chat_template_utils

    own = chat_template_utils.datetime
    chat_template_utils.datetime = FixedClock(moment)
    try:
        yield
    finally:
        chat_template_utils.datetime = own


def rendered(
    messages: Messages,
    tokenizer: Any,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
    *,
    answer_next: bool = False,
) -> str:
    """What the chat template makes of the messages; its own special tokens are in the text.

    `arguments`: what the template is given beside them, such as `tools`. Where the template refuses the messages as
    they are, messages without content get an empty one; then arguments of tool calls become JSON text (DeepSeek-V3).
    """
    if not tokenizer.chat_template:
        raise OnecardError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template, which rows of chat messages need: take a "
            "model that was tuned for chat, put a chat_template.jinja beside its tokenizer, or give rows of plain text."
        )

    def write(messages: Messages) -> str:
        filled = tuple({"content": "", **each} for each in messages)
        ways = (messages, filled, tuple(map(with_text_arguments, filled)))
        errors = []
        for place, way in enumerate(ways):
            if way not in ways[:place]:
                try:
                    return apply_template(way, tokenizer, arguments, answer_next)
                except BadRowError as error:
                    errors.append(error)
        raise errors[0]

    text = write(messages)
    unseen = [place for place, each in enumerate(messages) if each.get("content", "").strip() not in text]
    check_written(messages, write, unseen if answer_next else [place for place in unseen if place == len(messages) - 1])
    return unicode(text, "chat template")


def with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text."""

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
    """`apply_chat_template`, with the current date of `template_date`."""
    date = _date.get()
    dated = date is not None and "strftime_now" in str(tokenizer.chat_template)
    try:
        with fixed_clock(date) if date is not None and dated else nullcontext():
            return str(
                tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=answer_next, tokenize=False, **arguments
                )
            )
    except Exception as error:  # a template raises what it likes, such as that roles must alternate
        raise BadRowError(f"chat template: {reason(error)}") from error


def check_written(messages: Messages, write: Callable[[Messages], str], unseen: Sequence[int]) -> None:
    """A template that leaves out the text of a message, or tool calls, makes a bad row: an empty answer, or one to
    another question, would be learned. Both are looked for by names that no other text has; `unseen` are the places of
    messages whose own text is not in what the template writes.
    """
    for place in unseen:
        marked = {**messages[place], "content": ANSWER}
        if not marked.get("tool_calls") and ANSWER not in write((*messages[:place], marked, *messages[place + 1 :])):
            raise BadRowError(f"chat template: it does not write the content of messages[{place}]")
    calls = sum(len(message.get("tool_calls", ())) for message in messages)
    for key, word in (("name", CALL), ("id", CALL_ID)) if calls else ():
        named = tuple(
            {**message, "tool_calls": [renamed(call, key, word) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        )
        if write(named).count(word) >= calls:
            return
    if calls:
        raise BadRowError("chat template: it does not write the tool calls of the messages")


def renamed(call: dict[str, Any], key: str, word: str) -> dict[str, Any]:
    """A tool call to a function called `word`, whether it has its name under `function`, as OpenAI's do, or not; or
    with that id, which is what some templates write (Kimi-K2).
    """
    if key == "name" and "function" in call:
        return {**call, "function": {**call["function"], key: word}}
    return {**call, key: word}


# --- what ends an answer ---


@dataclass(frozen=True)
class Ends:
    """The ids that end an answer. `texts`: how they and all special tokens are written.

    `turn` is the one that the chat template closes an answer with; None without a template, and where it writes none.
    `chat`: those that a template with `turn` may close answers with, such as another one behind tool calls.
    """

    ids: frozenset[int]
    turn: int | None = None
    chat: frozenset[int] = frozenset()
    texts: Mapping[str, int] = field(default_factory=dict)


def answer_ends(tokenizer: Any) -> Ends:
    """What ends an answer: the tokenizer's EOS, the EOS ids of the model's generation config (which `load_tokenizer`
    notes on the tokenizer), and the token that the chat template closes an answer with.
    """
    template = getattr(tokenizer, "chat_template", None)
    listed = frozenset({tokenizer.eos_token_id, *getattr(tokenizer, "generation_eos", ())} - {None})
    return find_ends(tokenizer, str(template), listed) if template else Ends(listed)


def closing_token(tokenizer: Any, *, chat: bool) -> int:
    """The token that answers in training data end with: of chat messages the template's, else EOS."""
    turn = answer_ends(tokenizer).turn if chat else None
    end = tokenizer.eos_token_id if turn is None else turn
    if end is None:
        raise OnecardError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token, so no response could end.")
    return int(end)


@lru_cache(maxsize=8)
def find_ends(tokenizer: Any, template: str, listed: frozenset[int]) -> Ends:
    """`answer_ends` of a tokenizer with a template, which is an argument for the sake of the cache."""
    special = {str(token): place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = special | {text: place for place in listed if (text := tokenizer.decode([place]))}
    turn = closing_turn(tokenizer, listed, texts)
    if turn is None:
        return Ends(listed, texts=texts)
    chat = {turn} | {place for text, place in texts.items() if place in listed and text in template}
    return Ends(listed | {turn}, turn, frozenset(chat), texts)


def closing_turn(tokenizer: Any, listed: frozenset[int], texts: Mapping[str, int]) -> int | None:
    """The first token behind an answer that is one of `listed`, or else the first special one.

    Some templates write more behind the last answer than behind others (Phi-3: EOS): then what is written behind both
    counts.
    """
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    for opening in ((question,), ({**question, "role": "system"}, question)):
        last = text_behind(ANSWER, (*opening, answer), tokenizer)
        middle = text_behind(ANSWER, (*opening, answer, question), tokenizer) or ""
        if last is None:
            continue
        tokens = leading_tokens(last, texts)
        found = [token for end, token in tokens if middle.startswith(last[:end])] or [token for _, token in tokens]
        return next((token for token in found if token in listed), found[0] if found else None)
    return None


def text_behind(content: str, messages: Messages, tokenizer: Any) -> str | None:
    """What the template writes behind a message's content; None where it refuses the messages or leaves it out."""
    try:
        _, found, behind = rendered(messages, tokenizer).rpartition(content)
    except BadRowError:
        return None
    return behind if found else None


def leading_tokens(text: str, texts: Mapping[str, int]) -> list[tuple[int, int]]:
    """(where it ends, its id) of each special token that the text begins with; white space may stand between them."""
    found, place = list[tuple[int, int]](), 0
    while place < len(text):
        match = max((each for each in texts if text.startswith(each, place)), key=len, default="")
        if match:
            found.append((place + len(match), texts[match]))
        elif not text[place].isspace():
            break
        place += max(len(match), 1)
    return found


def trailing_tokens(text: str, texts: Mapping[str, int]) -> list[tuple[int, int]]:
    """The same of those that the text ends with, in their order in the text."""
    found, place, all_texts = list[tuple[int, int]](), len(text), tuple(texts)
    while place:
        match = ""
        if text.endswith(all_texts, 0, place):
            match = max((each for each in texts if text.endswith(each, 0, place)), key=len)
            found.append((place, texts[match]))
        elif not text[place - 1].isspace():
            break
        place -= max(len(match), 1)
    return found[::-1]


def through_end(text: str, tokenizer: Any) -> tuple[str, int | None]:
    """A rendered text up to the token that ends its last turn, and that token; all of it and None if there is none."""
    ends = answer_ends(tokenizer)
    tail = trailing_tokens(text, ends.texts)
    place, end = next(((place, token) for place, token in tail if token in ends.ids), (len(text), None))
    return text[:place], end
