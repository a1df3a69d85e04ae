"""Read and check the values of a row's columns: text, chat messages, numbers, labels.

A `Text` is a string or a tuple of chat messages. Functions here raise BadRowError for a value that cannot be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeAlias, TypeGuard

from onecard.data.readers import json_type, reason
from onecard.utils.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_COLUMNS = ("image", "images")  # TRL's names
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # arguments of a chat template besides the messages
# Parameters of `apply_chat_template` itself. A row's `chat_template_kwargs` must not set them.
RESERVED_ARGUMENTS = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip

# A message keeps its other keys besides role and content (name, tool calls): the chat template may read them.
Messages: TypeAlias = tuple[dict[str, Any], ...]
Text: TypeAlias = str | Messages


class BadRowError(Exception):
    """Why a row cannot be used. The caller turns it into an `OnecardError` or a `BadRow`, with the row's location."""


def is_chat(text: Text) -> TypeGuard[Messages]:
    return not isinstance(text, str)


def has(values: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a value in a column. Null counts as missing: Parquet and CSV write it for a missing key."""
    return values.get(name) is not None


def check_no_images(values: Mapping[str, Any]) -> None:
    """Raise BadRowError for a row with images: without them its text would be a different example."""
    name = next((name for name in IMAGE_COLUMNS if has(values, name) and values[name] != []), None)
    if name is not None:
        raise BadRowError(f"{name}: images are not supported; expected rows that have only text")


def column(values: Mapping[str, Any], name: str) -> Any:
    """A column's value. Raises BadRowError if the column is missing or null."""
    if name not in values:
        raise BadRowError(f"no column '{name}'; {columns_present(values)}{nearest(name, unknown_columns(values))}")
    if values[name] is None:
        raise BadRowError(f"{name} is null")
    return values[name]


def text_or_messages(values: Mapping[str, Any], name: str) -> Text:
    """A column's text or messages."""
    return as_text(column(values, name), name)


def as_text(value: object, name: str) -> Text:
    """Check a text or a list of messages, and return it as `Text`. `name` is its name in errors."""
    if isinstance(value, str):
        return check_unicode(value, name)
    if not isinstance(value, list):
        raise BadRowError(f"{name}: expected text or a list of messages, got {json_type(value)}")
    if not value:
        raise BadRowError(f"{name}: the list of messages is empty")
    return tuple(message(item, f"{name}[{index}]") for index, item in enumerate(value))


def message(value: object, where: str) -> dict[str, Any]:
    """Check one chat message, and return it without null entries: Parquet adds them to give all messages the same keys.

    An assistant's message with tool calls may have no content.
    """
    if not isinstance(value, dict):
        raise BadRowError(f"{where}: expected an object with role and content, got {json_type(value)}")
    fields = {key: item for key, item in value.items() if item is not None}
    if fields.get("function_call"):
        raise BadRowError(f"{where}: function_call is deprecated; expected a list in tool_calls")
    if fields.get("tool_calls"):
        fields["tool_calls"] = tool_calls(fields["tool_calls"], f"{where}: tool_calls")
    has_calls = fields.get("role") == "assistant" and bool(fields.get("tool_calls"))
    for key in ("role",) if has_calls and "content" not in fields else ("role", "content"):
        if key not in fields:
            problem = (
                f"{key} is null" if key in value else f"no '{key}'; there are {', '.join(map(str, value)) or 'none'}"
            )
            raise BadRowError(f"{where}: {problem}")
        if not isinstance(fields[key], str):
            raise BadRowError(f"{where}: {key}: expected text, got {json_type(fields[key])}")
    if fields["role"] not in ROLES:
        role = fields["role"]
        raise BadRowError(
            f"{where}: unknown role '{role[:40]}'; expected one of {', '.join(ROLES)}.{nearest(role, ROLES)}"
        )
    check_unicode(fields.get("content", ""), where)
    return fields


def tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Check an assistant's tool calls, a list or a JSON string.

    Arguments that are a JSON string, as OpenAI's are, become objects: chat templates expect objects.
    """
    if isinstance(value, str):
        value = from_json(value, where)
    if not isinstance(value, list):
        raise BadRowError(f"{where}: expected a list of calls, got {json_type(value)}")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(
                f"{where}[{index}]: expected an object with the name of a function, got {json_type(call)}"
            )
        function = {key: item for key, item in function.items() if item is not None}
        if isinstance(function.get("arguments"), str):
            arguments = from_json(function["arguments"] or "{}", f"{where}[{index}]: arguments")
            if not isinstance(arguments, dict):
                raise BadRowError(f"{where}[{index}]: arguments: expected an object, got {json_type(arguments)}")
            function["arguments"] = arguments
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def from_json(text: str, where: str) -> Any:
    """Parse a JSON string. `where` is its location in errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{where}: not JSON: {reason(error)}") from error


def template_arguments(values: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """Arguments of the chat template besides the messages: `tools`, and the variables in `chat_template_kwargs`.

    Both columns may be JSON strings. If `text` is a string, they are ignored, because no template is applied.
    """
    if not is_chat(text):
        return {}
    tools = list_or_object(values, "tools", list, "a list of tools")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise BadRowError(f"tools[{index}]: expected an object (a JSON schema), got {json_type(tool)}")
    variables = list_or_object(values, "chat_template_kwargs", dict, "an object") or {}
    reserved = next((name for name in variables if name in RESERVED_ARGUMENTS), None)
    if reserved is not None:
        raise BadRowError(
            f"chat_template_kwargs: '{reserved}' is reserved; expected names of variables of the chat template"
        )
    return ({"tools": tools} if tools else {}) | {name: item for name, item in variables.items() if item is not None}


def list_or_object(values: Mapping[str, Any], name: str, expected: type, description: str) -> Any:
    """A column's list or object, or the value of its JSON string; None if the column is missing."""
    value = values.get(name)
    if isinstance(value, str):
        value = from_json(value, name) if value.strip() else None
    if value is not None and not isinstance(value, expected):
        raise BadRowError(f"{name}: expected {description}, or its JSON as text, got {json_type(value)}")
    return value


def check_unicode(text: str, where: str) -> str:
    """Check that a text can be encoded, and return it. JSON can hold half a surrogate pair, which tokenizers reject."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{where}: not valid Unicode at character {error.start + 1}") from error
    return text


def number(values: Mapping[str, Any], name: str) -> float:
    """A column's finite number."""
    value = column(values, name)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise BadRowError(f"{name}: expected a number, got {json_type(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise BadRowError(f"{name}: expected a finite number, got {result}")
    return result


def boolean(values: Mapping[str, Any], name: str) -> bool:
    """A column's boolean; 1 and 0 are accepted."""
    value = column(values, name)
    if value not in (0, 1):  # True and False are 1 and 0
        text = f"{value:g}" if isinstance(value, (int, float)) else json_type(value)
        raise BadRowError(f"{name}: expected true or false (or 1 or 0), got {text}")
    return bool(value)


def check_same_form(name: str, text: Text, other: str, expected: Text) -> None:
    """Raise BadRowError unless both texts are strings, or both are messages."""
    if is_chat(text) != is_chat(expected):
        words = {True: "messages", False: "text"}
        raise BadRowError(f"{name} is {words[is_chat(text)]} but {other} is {words[is_chat(expected)]}")


def check_prompt_end(name: str, text: Text) -> None:
    """Raise BadRowError if a prompt ends with an assistant's message."""
    if is_chat(text) and text[-1]["role"] == "assistant":
        raise BadRowError(f"{name}: its last message is the assistant's; expected a message to answer")


def check_answer_roles(name: str, text: Text) -> None:
    """Raise BadRowError unless an answer's first and last messages are the assistant's. Others may be of any role."""
    if is_chat(text) and not text[0]["role"] == text[-1]["role"] == "assistant":
        roles = ", ".join(item["role"] for item in text)
        raise BadRowError(f"{name}: expected an assistant's message first and last, got {roles}")


def columns_present(values: Mapping[str, Any]) -> str:
    """The columns that a row has, for error messages."""
    present = [str(name) for name in values if has(values, name)]
    if not present:
        return f"every column is null ({', '.join(map(str, values))})." if values else "the row is empty."
    return f"there are {', '.join(present)}."


def unknown_columns(values: Mapping[str, Any]) -> list[str]:
    """Columns of a row that are not in KNOWN_COLUMNS. One of them may be a misspelling of a missing column."""
    return [str(name) for name in values if name not in KNOWN_COLUMNS and has(values, name)]


KNOWN_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "margin", "score")
