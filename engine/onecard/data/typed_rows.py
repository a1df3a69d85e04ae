"""Convert rows to typed rows: find the columns that each kind of training needs, and check their values.

The column names are TRL's. A text is a string or a tuple of chat messages:

| training | columns |
|---|---|
| SFT | `messages`, or `prompt` + `completion`, or `text` (the first that a row has; a null column counts as missing) |
| reward, DPO: pairs | `chosen`, `rejected`, `prompt`; optional `margin` |
| reward: scores | `prompt`, `completion`, `score` |
| reward: rankings | `prompt`, `completions`: two or more answers, best first |
| KTO: labelled answers | `prompt`, `completion`, `label`: whether the answer is desirable |
| prompts | `prompt` |

Chat pairs need no `prompt`: the messages that chosen and rejected have in common at their start are the prompt (TRL's
implicit prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from onecard.data.columns import (
    BadRowError,
    Messages,
    Text,
    as_text,
    boolean,
    check_answer_roles,
    check_prompt_end,
    check_same_form,
    column,
    columns_present,
    has,
    is_chat,
    number,
    text_or_messages,
    unknown_columns,
)
from onecard.data.files import Row
from onecard.data.readers import json_type
from onecard.utils.errors import nearest


@dataclass(frozen=True)
class TextRow:
    """Plain text; all of it is learned."""

    text: str


@dataclass(frozen=True)
class MessagesRow:
    """A conversation to learn."""

    messages: Messages


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and the completion to learn: both strings, or both messages."""

    prompt: Text
    completion: Text


SFTRow: TypeAlias = TextRow | MessagesRow | CompletionRow


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt: all strings, or all messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float = 0.0


@dataclass(frozen=True)
class ScoredRow:
    """A prompt with one answer, and the answer's score."""

    prompt: Text
    completion: Text
    score: float


@dataclass(frozen=True)
class RankingRow:
    """Two or more answers to one prompt, best first: all strings, or all messages."""

    prompt: Text
    completions: tuple[Text, ...]


@dataclass(frozen=True)
class LabelledRow:
    """A prompt with one answer, and whether the answer is desirable."""

    prompt: Text
    completion: Text
    desirable: bool


def sft_row(row: Row) -> SFTRow:
    """The first kind of SFT example whose columns the row has. Raises BadRowError if there is none."""
    values = row.values
    complete = [make for columns, make in SFT_KINDS.items() if all(has(values, name) for name in columns)]
    partial = [make for columns, make in SFT_KINDS.items() if any(has(values, name) for name in columns)]
    if partial:
        return (complete or partial)[0](values)  # if a column is missing, it raises an error that names the column
    null = [name for columns in SFT_KINDS for name in columns if name in values]
    if null:
        others = f"; {columns_present(values)}" if any(has(values, str(name)) for name in values) else ""
        raise BadRowError(f"{', '.join(null)} {'is' if len(null) == 1 else 'are'} null{others}")
    near = next(filter(None, (nearest(name, unknown_columns(values)) for name in ("messages", "text"))), "")
    raise BadRowError(f"no column 'messages', 'prompt' + 'completion', or 'text'; {columns_present(values)}{near}")


def preference_row(row: Row) -> PreferenceRow:
    """A pair with its prompt. Chat answers may begin with the prompt's messages; these are then removed from them."""
    values = row.values
    chosen, rejected = text_or_messages(values, "chosen"), text_or_messages(values, "rejected")
    check_same_form("rejected", rejected, "chosen", chosen)
    given = text_or_messages(values, "prompt") if has(values, "prompt") or not is_chat(chosen) else None
    if is_chat(chosen) and is_chat(rejected) and not isinstance(given, tuple):
        # If the prompt is text beside chat answers, it repeats their first message (UltraFeedback), and is not used.
        prompt: Text = shared_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = given or ""
        check_same_form("chosen", chosen, "prompt", prompt)
    check_prompt_end("prompt", prompt)
    check_answer_roles("chosen", chosen)
    check_answer_roles("rejected", rejected)
    margin = number(values, "margin") if has(values, "margin") else 0.0
    return PreferenceRow(prompt, chosen, rejected, margin)


def scored_row(row: Row, bounds: tuple[float, float] | None = None) -> ScoredRow:
    """An answer with its score. Raises BadRowError if the score is outside `bounds`."""
    answer = completion_kind(row.values)
    score = number(row.values, "score")
    if bounds is not None and not bounds[0] <= score <= bounds[1]:
        raise BadRowError(f"score: {score:g}, expected {bounds[0]:g} to {bounds[1]:g}")
    return ScoredRow(answer.prompt, answer.completion, score)


def ranking_row(row: Row) -> RankingRow:
    """Answers in their order, best first."""
    values = row.values
    given = column(values, "completions")
    if not isinstance(given, list):
        raise BadRowError(f"completions: expected a list of answers, best first, got {json_type(given)}")
    if len(given) < 2:
        raise BadRowError(f"completions: expected 2 answers or more, got {len(given)}")
    prompt = text_or_messages(values, "prompt")
    check_prompt_end("prompt", prompt)
    answers = {f"completions[{index}]": as_text(item, f"completions[{index}]") for index, item in enumerate(given)}
    for name, answer in answers.items():
        check_same_form(name, answer, "prompt", prompt)
        check_answer_roles(name, answer)
    return RankingRow(prompt, tuple(answers.values()))


def labelled_row(row: Row) -> LabelledRow:
    """An answer with its label."""
    answer = completion_kind(row.values)
    return LabelledRow(answer.prompt, answer.completion, boolean(row.values, "label"))


def shared_start(chosen: Messages, rejected: Messages) -> Messages:
    """The common messages at the start of both answers. At least the last message of each is not part of them."""
    limit = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if count == 0:
        raise BadRowError(
            "no prompt: expected messages in 'prompt', or chosen and rejected that begin with the same message"
        )
    return chosen[:count]


def row_prompt(row: Row) -> Text:
    """The prompt of a row. The other columns are for rewards."""
    prompt = text_or_messages(row.values, "prompt")
    check_prompt_end("prompt", prompt)
    return prompt


def messages_kind(values: Mapping[str, Any]) -> MessagesRow:
    messages = text_or_messages(values, "messages")
    if not is_chat(messages):
        raise BadRowError("messages: expected a list of messages, got text")
    return MessagesRow(messages)


def completion_kind(values: Mapping[str, Any]) -> CompletionRow:
    prompt, completion = text_or_messages(values, "prompt"), text_or_messages(values, "completion")
    check_same_form("completion", completion, "prompt", prompt)
    check_prompt_end("prompt", prompt)
    check_answer_roles("completion", completion)
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
