"""From rows to typed examples: which columns there are, and that their values are what their names promise.

Text is a string or a tuple of chat messages, in TRL's columns:

| training | columns |
|---|---|
| SFT | `messages`, or `prompt` + `completion`, or `text` (the first that a row has) |
| reward, DPO | `chosen`, `rejected`, `prompt`; `margin` if known |
| prompts | `prompt` |

Chat answers need no `prompt`: it is the messages that chosen and rejected share at their start (TRL's implicit prompt).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from onecard.data.files import Row, kind
from onecard.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")

# A message keeps whatever else it has beside role and content (name, tool calls): the chat template may read it.
Messages: TypeAlias = tuple[dict[str, Any], ...]
Text: TypeAlias = str | Messages


class BadRowError(Exception):
    """Why one row cannot be used. Becomes an `OnecardError` or a `BadRow`, which add the place."""


@dataclass(frozen=True)
class TextRow:
    """Plain text to learn from end to end."""

    text: str


@dataclass(frozen=True)
class MessagesRow:
    """A conversation to learn from."""

    messages: Messages


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and the completion to learn: both text, or both messages."""

    prompt: Text
    completion: Text


SFTRow: TypeAlias = TextRow | MessagesRow | CompletionRow


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt: all text, or all messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float = 0.0


@dataclass(frozen=True)
class PromptRow:
    """A prompt to answer."""

    prompt: Text


def sft_row(row: Row) -> SFTRow:
    """The first kind of SFT example that the row has the columns of."""
    values = row.values
    whole = [make for columns, make in SFT_KINDS.items() if all(name in values for name in columns)]
    begun = [make for columns, make in SFT_KINDS.items() if any(name in values for name in columns)]
    for make in whole + begun:  # of a kind that is only begun, `make` says which column is missing
        return make(values)
    near = next(filter(None, (nearest(name, unused(values)) for name in ("messages", "text"))), "")
    raise BadRowError(f"no column 'messages', 'prompt' + 'completion', or 'text'; {there_are(values)}{near}")


def preference_row(row: Row) -> PreferenceRow:
    """A pair with its prompt, which chat answers may carry at their start."""
    values = row.values
    chosen, rejected = text_or_messages(values, "chosen"), text_or_messages(values, "rejected")
    must_match("rejected", rejected, "chosen", chosen)
    given = text_or_messages(values, "prompt") if "prompt" in values or not is_chat(chosen) else None
    if is_chat(chosen) and is_chat(rejected) and not isinstance(given, tuple):
        # A text prompt beside whole conversations only repeats their first message, as in UltraFeedback.
        prompt: Text = shared_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = given or ""
        must_match("chosen", chosen, "prompt", prompt)
    must_ask("prompt", prompt)
    must_answer("chosen", chosen)
    must_answer("rejected", rejected)
    return PreferenceRow(prompt, chosen, rejected, margin_of(values))


def prompt_row(row: Row) -> PromptRow:
    """The prompt of a row; its other columns are left to the rewards."""
    prompt = text_or_messages(row.values, "prompt")
    must_ask("prompt", prompt)
    return PromptRow(prompt)


def messages_kind(values: Mapping[str, Any]) -> MessagesRow:
    messages = text_or_messages(values, "messages")
    if not is_chat(messages):
        raise BadRowError("messages: expected a list of messages, got text")
    return MessagesRow(messages)


def completion_kind(values: Mapping[str, Any]) -> CompletionRow:
    prompt, completion = text_or_messages(values, "prompt"), text_or_messages(values, "completion")
    must_match("completion", completion, "prompt", prompt)
    must_ask("prompt", prompt)
    must_answer("completion", completion)
    return CompletionRow(prompt, completion)


def text_kind(values: Mapping[str, Any]) -> TextRow:
    text = text_or_messages(values, "text")
    if is_chat(text):
        raise BadRowError("text: expected text, got a list; a list of messages belongs in 'messages'")
    return TextRow(str(text))


SFT_KINDS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], SFTRow]] = {
    ("messages",): messages_kind,
    ("prompt", "completion"): completion_kind,
    ("text",): text_kind,
}


def is_chat(text: Text) -> TypeGuard[Messages]:
    return not isinstance(text, str)


def text_or_messages(values: Mapping[str, Any], name: str) -> Text:
    """A column's text or messages, checked."""
    if name not in values:
        raise BadRowError(f"no column '{name}'; {there_are(values)}{nearest(name, unused(values))}")
    value = values[name]
    if value is None:
        raise BadRowError(f"{name} is null")
    if isinstance(value, str):
        return unicode(value, name)
    if not isinstance(value, list):
        raise BadRowError(f"{name}: expected text or a list of messages, got {kind(value)}")
    if not value:
        raise BadRowError(f"{name}: the list of messages is empty")
    return tuple(message(item, f"{name}[{index}]") for index, item in enumerate(value))


def message(value: object, place: str) -> dict[str, Any]:
    """One chat message; null entries, which Parquet adds to make all messages alike, are left out."""
    if not isinstance(value, dict):
        raise BadRowError(f"{place}: expected an object with role and content, got {kind(value)}")
    kept = {key: item for key, item in value.items() if item is not None}
    for key in ("role", "content"):
        if key not in kept:
            state = (
                f"{key} is null" if key in value else f"no '{key}'; there are {', '.join(map(str, value)) or 'none'}"
            )
            raise BadRowError(f"{place}: {state}")
        if not isinstance(kept[key], str):
            raise BadRowError(f"{place}: {key}: expected text, got {kind(kept[key])}")
    if kept["role"] not in ROLES:
        role = kept["role"]
        raise BadRowError(
            f"{place}: unknown role '{role[:40]}'; expected one of {', '.join(ROLES)}.{nearest(role, ROLES)}"
        )
    unicode(kept["content"], place)
    return kept


def unicode(text: str, place: str) -> str:
    """JSON can hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{place}: not valid Unicode at character {error.start + 1}") from error
    return text


def margin_of(values: Mapping[str, Any]) -> float:
    """By how much the chosen answer is better; 0 where there is no such column."""
    if "margin" not in values:
        return 0.0
    value = values["margin"]
    if value is None:
        raise BadRowError("margin is null")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRowError(f"margin: expected a number, got {kind(value)}")
    try:
        margin = float(value)
    except OverflowError:
        margin = math.inf
    if not math.isfinite(margin):
        raise BadRowError(f"margin: expected a finite number, got {margin}")
    return margin


def shared_start(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that open both, leaving each at least one to answer with."""
    limit = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if count == 0:
        raise BadRowError(
            "no prompt: 'prompt' holds no messages, and chosen and rejected share no message at their start"
        )
    return chosen[:count]


def must_match(name: str, text: Text, other: str, expected: Text) -> None:
    if is_chat(text) != is_chat(expected):
        words = {True: "messages", False: "text"}
        raise BadRowError(f"{name} is {words[is_chat(text)]} but {other} is {words[is_chat(expected)]}")


def must_ask(name: str, text: Text) -> None:
    """A prompt leaves the next word to the assistant."""
    if is_chat(text) and text[-1]["role"] == "assistant":
        raise BadRowError(f"{name}: its last message is the assistant's, which leaves nothing to answer")


def must_answer(name: str, text: Text) -> None:
    """An answer opens and ends with the assistant; in between there may be tools."""
    if is_chat(text) and not text[0]["role"] == text[-1]["role"] == "assistant":
        roles = ", ".join(item["role"] for item in text)
        raise BadRowError(f"{name}: expected to open and end with the assistant's message, got {roles}")


def there_are(values: Mapping[str, Any]) -> str:
    return f"there are {', '.join(map(str, values))}." if values else "the row is empty."


def unused(values: Mapping[str, Any]) -> list[str]:
    """Column names that might be a misspelling: not those that mean something by themselves."""
    return [str(name) for name in values if name not in KNOWN]


KNOWN = ("text", "messages", "prompt", "completion", "chosen", "rejected", "margin", "score")
