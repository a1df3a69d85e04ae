"""Rows to typed examples: find the columns of each kind of training, and check their values.

The columns are TRL's. A text is a string or a tuple of chat messages:

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
    column,
    columns_present,
    has,
    is_chat,
    must_answer,
    must_ask,
    must_match,
    number,
    text_or_messages,
    truth,
    unused,
)
from onecard.data.files import Row
from onecard.data.readers import json_type
from onecard.utils.errors import did_you_mean


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
    """One answer and its given score."""

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
    """One answer, and whether it is desirable."""

    prompt: Text
    completion: Text
    desirable: bool


@dataclass(frozen=True)
class PromptRow:
    """A prompt to answer."""

    prompt: Text


def sft_row(row: Row) -> SFTRow:
    """The first kind of SFT example whose columns the row has. Raises BadRowError if there is none."""
    values = row.values
    complete = [make for columns, make in SFT_KINDS.items() if all(has(values, name) for name in columns)]
    partial = [make for columns, make in SFT_KINDS.items() if any(has(values, name) for name in columns)]
    for make in complete + partial:  # for a partial kind, `make` raises an error that names the missing column
        return make(values)
    null = [name for columns in SFT_KINDS for name in columns if name in values]
    if null:
        others = f"; {columns_present(values)}" if any(has(values, str(name)) for name in values) else ""
        raise BadRowError(f"{', '.join(null)} {'is' if len(null) == 1 else 'are'} null{others}")
    near = next(filter(None, (did_you_mean(name, unused(values)) for name in ("messages", "text"))), "")
    raise BadRowError(f"no column 'messages', 'prompt' + 'completion', or 'text'; {columns_present(values)}{near}")


def preference_row(row: Row) -> PreferenceRow:
    """A pair with its prompt, which chat answers may include at their start."""
    values = row.values
    chosen, rejected = text_or_messages(values, "chosen"), text_or_messages(values, "rejected")
    must_match("rejected", rejected, "chosen", chosen)
    given = text_or_messages(values, "prompt") if has(values, "prompt") or not is_chat(chosen) else None
    if is_chat(chosen) and is_chat(rejected) and not isinstance(given, tuple):
        # A text prompt in a row of whole conversations repeats their first message, as in UltraFeedback.
        prompt: Text = shared_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = given or ""
        must_match("chosen", chosen, "prompt", prompt)
    must_ask("prompt", prompt)
    must_answer("chosen", chosen)
    must_answer("rejected", rejected)
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
        raise BadRowError(f"completions: expected a list of answers, the best first, got {json_type(given)}")
    if len(given) < 2:
        raise BadRowError(f"completions: expected 2 answers or more, got {len(given)}")
    prompt = text_or_messages(values, "prompt")
    must_ask("prompt", prompt)
    answers = {f"completions[{index}]": as_text(item, f"completions[{index}]") for index, item in enumerate(given)}
    for name, answer in answers.items():
        must_match(name, answer, "prompt", prompt)
        must_answer(name, answer)
    return RankingRow(prompt, tuple(answers.values()))


def labelled_row(row: Row) -> LabelledRow:
    """An answer with its label."""
    answer = completion_kind(row.values)
    return LabelledRow(answer.prompt, answer.completion, truth(row.values, "label"))


def shared_start(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that both begin with; each keeps at least one message as its answer."""
    limit = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if count == 0:
        raise BadRowError(
            "no prompt: 'prompt' holds no messages, and chosen and rejected share no message at their start"
        )
    return chosen[:count]


def prompt_row(row: Row) -> PromptRow:
    """The prompt of a row. The other columns are for rewards."""
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
