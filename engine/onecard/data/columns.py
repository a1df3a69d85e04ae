"""The values of a row's columns, checked: text, chat messages, numbers, labels.

Text is a string or a tuple of chat messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeAlias, TypeGuard

from onecard.data.readers import kind, reason
from onecard.utils.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_COLUMNS = ("image", "images")  # TRL's names
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # what a chat template is given beside the messages
# Settings of `apply_chat_template` itself, which a row's variables must not change.
TEMPLATE_SETTINGS = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip

# A message keeps whatever else it has beside role and content (name, tool calls): the chat template may read it.
Messages: TypeAlias = tuple[dict[str, Any], ...]
Text: TypeAlias = str | Messages


class BadRowError(Exception):
    """Why one row cannot be used. Becomes an `OnecardError` or a `BadRow`, which add the place."""


def is_chat(text: Text) -> TypeGuard[Messages]:
    return not isinstance(text, str)


def has(values: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a column. Null is no column: Parquet and CSV write it where other rows have a value."""
    return values.get(name) is not None


def check_no_images(values: Mapping[str, Any]) -> None:
    """Stop at a row that is text and images: its text alone would be another example."""
    name = next((name for name in IMAGE_COLUMNS if has(values, name) and values[name] != []), None)
    if name is not None:
        raise BadRowError(f"{name}: expected rows of text alone")


def column(values: Mapping[str, Any], name: str) -> Any:
    """What a column holds, which must be there and not be null."""
    if name not in values:
        raise BadRowError(f"no column '{name}'; {there_are(values)}{nearest(name, unused(values))}")
    if values[name] is None:
        raise BadRowError(f"{name} is null")
    return values[name]


def text_or_messages(values: Mapping[str, Any], name: str) -> Text:
    """A column's text or messages."""
    return as_text(column(values, name), name)


def as_text(value: object, name: str) -> Text:
    """Text or messages; `name` is what the error calls them."""
    if isinstance(value, str):
        return unicode(value, name)
    if not isinstance(value, list):
        raise BadRowError(f"{name}: expected text or a list of messages, got {kind(value)}")
    if not value:
        raise BadRowError(f"{name}: the list of messages is empty")
    return tuple(message(item, f"{name}[{index}]") for index, item in enumerate(value))


def message(value: object, place: str) -> dict[str, Any]:
    """One chat message; null entries, which Parquet adds to make all messages alike, are left out.

    An assistant's message with tool calls may have no content.
    """
    if not isinstance(value, dict):
        raise BadRowError(f"{place}: expected an object with role and content, got {kind(value)}")
    kept = {key: item for key, item in value.items() if item is not None}
    if kept.get("function_call"):
        raise BadRowError(f"{place}: function_call is of an older protocol; expected a list in tool_calls")
    if kept.get("tool_calls"):
        kept["tool_calls"] = tool_calls(kept["tool_calls"], f"{place}: tool_calls")
    calls = kept.get("role") == "assistant" and bool(kept.get("tool_calls"))
    for key in ("role",) if calls and "content" not in kept else ("role", "content"):
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
    unicode(kept.get("content", ""), place)
    return kept


def tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """An assistant's calls, which may be JSON as text. Arguments that are JSON as text, as OpenAI's are, become
    objects: chat templates are written for these, and servers parse them as well.
    """
    if isinstance(value, str):
        value = from_json(value, place)
    if not isinstance(value, list):
        raise BadRowError(f"{place}: expected a list of calls, got {kind(value)}")
    found = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{place}[{index}]: expected an object with the name of a function, got {kind(call)}")
        function = {key: item for key, item in function.items() if item is not None}
        if isinstance(function.get("arguments"), str):
            arguments = from_json(function["arguments"] or "{}", f"{place}[{index}]: arguments")
            if not isinstance(arguments, dict):
                raise BadRowError(f"{place}[{index}]: arguments: expected an object, got {kind(arguments)}")
            function["arguments"] = arguments
        found.append({**call, "function": function} if "function" in call else function)
    return found


def from_json(text: str, place: str) -> Any:
    """JSON that a column holds as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{place}: not JSON: {reason(error)}") from error


def template_arguments(values: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """What a row's chat template is given beside its messages: `tools`, and the variables in `chat_template_kwargs`.

    Both may be JSON as text. Plain text has no template, and these columns then mean nothing.
    """
    if not is_chat(text):
        return {}
    tools = parsed(values, "tools", list, "a list of tools")
    for place, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise BadRowError(f"tools[{place}]: expected an object (a JSON schema), got {kind(tool)}")
    variables = parsed(values, "chat_template_kwargs", dict, "an object") or {}
    taken = next((name for name in variables if name in TEMPLATE_SETTINGS), None)
    if taken is not None:
        raise BadRowError(f"chat_template_kwargs: '{taken}' is no variable of a chat template")
    return ({"tools": tools} if tools else {}) | {name: item for name, item in variables.items() if item is not None}


def parsed(values: Mapping[str, Any], name: str, expected: type, what: str) -> Any:
    """A column's list or object, which may be JSON as text; None where there is no column."""
    value = values.get(name)
    if isinstance(value, str):
        value = from_json(value, name) if value.strip() else None
    if value is not None and not isinstance(value, expected):
        raise BadRowError(f"{name}: expected {what}, or its JSON as text, got {kind(value)}")
    return value


def unicode(text: str, place: str) -> str:
    """JSON can hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{place}: not valid Unicode at character {error.start + 1}") from error
    return text


def number(values: Mapping[str, Any], name: str) -> float:
    """A column's finite number."""
    value = column(values, name)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise BadRowError(f"{name}: expected a number, got {kind(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRowError(f"{name}: expected a finite number, got {found}")
    return found


def truth(values: Mapping[str, Any], name: str) -> bool:
    """A column's true or false, which may be written 1 or 0."""
    value = column(values, name)
    if value not in (0, 1):  # True and False are 1 and 0
        shown = f"{value:g}" if isinstance(value, (int, float)) else kind(value)
        raise BadRowError(f"{name}: expected true or false (or 1 or 0), got {shown}")
    return bool(value)


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
    """The columns that a row has, as an error names them."""
    present = [str(name) for name in values if has(values, name)]
    if not present:
        return f"every column is null ({', '.join(map(str, values))})." if values else "the row is empty."
    return f"there are {', '.join(present)}."


def unused(values: Mapping[str, Any]) -> list[str]:
    """Column names that might be a misspelling: not those that mean something by themselves."""
    return [str(name) for name in values if name not in KNOWN and has(values, name)]


KNOWN = ("text", "messages", "prompt", "completion", "chosen", "rejected", "margin", "score")
