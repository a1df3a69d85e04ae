"""The data report: bad rows, and counts of what was cut, empty or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from onecard.data.files import Row
from onecard.data.readers import MESSAGE_COLUMNS
from onecard.data.template_answers import REASONING, opens_thought, thought_of
from onecard.data.tokens import TruncatedAnswer

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

EMPTY = "responses are empty: only their end is learned"
LEFT_OUT = "answers are left out: the chat template writes them differently once the conversation goes on"
NAMED_BAD_ROWS = 3  # bad rows named in a note


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and the reason."""

    source: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.number}: {self.reason}"


@dataclass(frozen=True)
class Tokenized(Generic[T_co]):
    """Examples in the order of their rows. `notes`: counts of what was cut, empty, identical or skipped, as text.

    `groups`: a digest of each example's prompt before truncation. Examples with the same digest are held out together.
    """

    examples: Sequence[T_co]
    groups: Sequence[bytes]
    notes: tuple[str, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class BuiltExample(Generic[T_co]):
    """An example with its group, and what truncation did to its answers.

    `is_odd`: whether the note of its kind counts it, such as a pair with the same tokens on both sides.
    """

    example: T_co
    group: bytes
    answers: tuple[TruncatedAnswer, ...] = ()
    prompt_cut: bool = False
    is_odd: bool = False


def built_example(
    example: T, group: bytes, answers: Sequence[TruncatedAnswer], *, is_odd: bool = False
) -> BuiltExample[T]:
    """An example whose prompt was cut if its first answer says so."""
    return BuiltExample(example, group, tuple(answers), answers[0].prompt_cut, is_odd)


class DataReport:
    """Counts over rows and examples, which are added one by one, and the notes printed from them."""

    def __init__(self, tokenizer: Any) -> None:
        template = str(tokenizer.chat_template or "")
        self.leaves_out_tools = bool(template) and "tools" not in template
        self.leaves_out_thoughts = (
            bool(template) and not any(key in template for key in REASONING) and not opens_thought(tokenizer)
        )
        self.rows = self.tools = self.thoughts = self.examples = self.prompts_cut = self.odd = 0
        self.responses = self.cut = self.empty = self.answers = self.left_out = 0
        self.bad: list[BadRow] = []

    def add_row(self, row: Row) -> None:
        self.rows += 1
        if not any(isinstance(row.values.get(name), list) for name in MESSAGE_COLUMNS):
            return
        self.tools += self.leaves_out_tools and bool(row.values.get("tools"))
        self.thoughts += self.leaves_out_thoughts and has_thought(row)

    def add(self, built: BuiltExample[Any]) -> None:
        self.examples += 1
        self.prompts_cut += built.prompt_cut
        self.odd += built.is_odd
        for answer in built.answers:
            self.responses += 1
            self.cut += answer.cut
            self.empty += answer.empty
            self.answers += answer.num_answers
            self.left_out += answer.num_left_out

    def notes(self, max_length: int, odd: str = "") -> tuple[str, ...]:
        """A line for each count that is not 0. `odd`: the text for examples that are `is_odd`."""
        unwritten = "which the chat template does not write"
        return (
            *count_note(self.prompts_cut, self.examples, "prompts were cut at their beginning"),
            *count_note(self.cut, self.responses, f"responses were cut at max_length {max_length}"),
            *count_note(self.empty, self.responses, EMPTY),
            *count_note(self.left_out, self.answers, LEFT_OUT),
            *count_note(self.tools, self.rows, f"rows have tools, {unwritten}"),
            *count_note(self.thoughts, self.rows, f"rows have thoughts of their own, {unwritten}"),
            *count_note(self.odd, self.examples, odd),
            *bad_notes(self.bad, self.rows),
        )


def has_thought(row: Row) -> bool:
    """Whether a message of the row has a thought in a key of its own (`REASONING`)."""
    texts = (row.values.get(name) for name in MESSAGE_COLUMNS)
    messages = (message for text in texts if isinstance(text, list) for message in text if isinstance(message, dict))
    return any(map(thought_of, messages))


def count_note(count: int, total: int, what: str) -> tuple[str, ...]:
    """`3 of 100 ...`; empty if `count` is 0."""
    return (f"{count} of {total} {what}",) if count else ()


def bad_notes(bad: Sequence[BadRow], total: int) -> tuple[str, ...]:
    ellipsis = ["..."] if len(bad) > NAMED_BAD_ROWS else []
    named = "; ".join([*map(str, bad[:NAMED_BAD_ROWS]), *ellipsis])
    return count_note(len(bad), total, f"rows are bad and were skipped: {named}")
