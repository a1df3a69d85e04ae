"""The data report: bad rows, and how many prompts and responses were cut, empty or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from onecard.data.files import Row
from onecard.data.readers import MESSAGE_COLUMNS
from onecard.data.template_answers import REASONING_KEYS, prompt_opens_reasoning, reasoning_of
from onecard.data.tokens import TruncatedAnswer

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

EMPTY = "responses are empty: only their end token is learned"
LEFT_OUT = "answers are left out: the chat template writes them differently when more messages follow"
MAX_LISTED_BAD_ROWS = 3  # bad rows that a note lists with their reasons


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
    """Examples in the order of their rows. `notes`: lines such as `3 of 100 responses were cut at max_length 512`.

    `groups`: a digest of each example's prompt before truncation. Examples with the same digest are held out together.
    """

    examples: Sequence[T_co]
    groups: Sequence[bytes]
    notes: tuple[str, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class BuiltExample(Generic[T_co]):
    """An example with its group (see `Tokenized.groups`), and the result of truncating each of its answers.

    `is_suspicious`: it can be used, but is probably a mistake in the data, such as a pair with the same tokens on both
    sides. A note has the number of these.
    """

    example: T_co
    group: bytes
    answers: tuple[TruncatedAnswer, ...] = ()
    prompt_cut: bool = False
    is_suspicious: bool = False


def built_example(
    example: T, group: bytes, answers: Sequence[TruncatedAnswer], *, is_suspicious: bool = False
) -> BuiltExample[T]:
    """A `BuiltExample` whose `prompt_cut` is that of its answers, which all keep the same prompt."""
    return BuiltExample(example, group, tuple(answers), answers[0].prompt_cut, is_suspicious)


class DataReport:
    """Counts properties of rows and examples as they are added, and gives the notes that are printed."""

    def __init__(self, tokenizer: Any) -> None:
        template = str(tokenizer.chat_template or "")
        has_key = any(key in template for key in REASONING_KEYS)
        self.omits_tools = bool(template) and "tools" not in template
        self.omits_reasoning = bool(template) and not has_key and not prompt_opens_reasoning(tokenizer)
        self.rows = self.tools = self.reasoning = self.examples = self.prompts_cut = self.suspicious = 0
        self.responses = self.cut = self.empty = self.answers = self.left_out = 0
        self.bad: list[BadRow] = []

    def add_row(self, row: Row) -> None:
        self.rows += 1
        if not any(isinstance(row.values.get(name), list) for name in MESSAGE_COLUMNS):
            return
        self.tools += self.omits_tools and bool(row.values.get("tools"))
        self.reasoning += self.omits_reasoning and has_reasoning(row)

    def add(self, built: BuiltExample[Any]) -> None:
        self.examples += 1
        self.prompts_cut += built.prompt_cut
        self.suspicious += built.is_suspicious
        for answer in built.answers:
            self.responses += 1
            self.cut += answer.cut
            self.empty += answer.empty
            self.answers += answer.num_answers
            self.left_out += answer.num_left_out

    def notes(self, max_length: int, suspicious_note: str = "") -> tuple[str, ...]:
        """A line for each count that is not 0. `suspicious_note`: the text for examples that are `is_suspicious`."""
        unwritten = "which the chat template does not write"
        return (
            *count_note(self.prompts_cut, self.examples, "prompts were cut at their beginning"),
            *count_note(self.cut, self.responses, f"responses were cut at max_length {max_length}"),
            *count_note(self.empty, self.responses, EMPTY),
            *count_note(self.left_out, self.answers, LEFT_OUT),
            *count_note(self.tools, self.rows, f"rows have tools, {unwritten}"),
            *count_note(self.reasoning, self.rows, f"rows have reasoning in a key of its own, {unwritten}"),
            *count_note(self.suspicious, self.examples, suspicious_note),
            *bad_notes(self.bad, self.rows),
        )


def has_reasoning(row: Row) -> bool:
    """Whether a message of the row has its reasoning in a key of its own (`REASONING_KEYS`)."""
    texts = (row.values.get(name) for name in MESSAGE_COLUMNS)
    messages = (message for text in texts if isinstance(text, list) for message in text if isinstance(message, dict))
    return any(map(reasoning_of, messages))


def count_note(count: int, total: int, text: str) -> tuple[str, ...]:
    """The note `3 of 100 {text}`; empty if `count` is 0."""
    return (f"{count} of {total} {text}",) if count else ()


def bad_notes(bad: Sequence[BadRow], total: int) -> tuple[str, ...]:
    ellipsis = ["..."] if len(bad) > MAX_LISTED_BAD_ROWS else []
    named = "; ".join([*map(str, bad[:MAX_LISTED_BAD_ROWS]), *ellipsis])
    return count_note(len(bad), total, f"rows are bad and were skipped: {named}")
