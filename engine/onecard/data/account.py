"""From rows to a plain account: which became examples, which are bad, what was cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from onecard.data.columns import BadRowError, check_no_images
from onecard.data.files import Row
from onecard.data.readers import MESSAGE_COLUMNS
from onecard.data.template_answers import REASONING, opens_thought, thought_of
from onecard.data.tokens import Fitted
from onecard.errors import OnecardError

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

EMPTY = "responses are empty: only their end is learned"
LEFT_OUT = "answers are left out: the chat template writes them differently once the conversation goes on"
NAMED_BAD_ROWS = 3  # as many as fit a line that is still read


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used, and why."""

    source: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.number}: {self.reason}"


@dataclass(frozen=True)
class Tokenized(Generic[T_co]):
    """Examples in the order of their rows; `notes` say in numbers what was cut, empty, identical or skipped.

    `groups` has each example's prompt as it was before anything was cut: what has the same is held out together.
    """

    examples: tuple[T_co, ...]
    groups: tuple[str, ...]
    notes: tuple[str, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class Made(Generic[T_co]):
    """An example on its way into `Tokenized`: with its group, and what became of its answers."""

    example: T_co
    group: str
    answers: tuple[Fitted, ...] = ()
    prompt_cut: bool = False


def made(example: T, group: str, answers: Sequence[Fitted]) -> Made[T]:
    """An example of which `answers` are the parts."""
    return Made(example, group, tuple(answers), answers[0].prompt_cut)


def tokenized(
    rows: Sequence[Row],
    tokenizer: Any,
    examples: Sequence[Made[T]],
    bad: tuple[BadRow, ...],
    max_length: int,
    more_notes: tuple[str, ...] = (),
) -> Tokenized[T]:
    """The examples with a plain account of them."""
    notes = (*length_notes(examples, max_length), *template_notes(rows, tokenizer, examples), *more_notes)
    notes += bad_notes(bad, len(rows))
    return Tokenized(tuple(item.example for item in examples), tuple(item.group for item in examples), notes, bad)


def collect(rows: Iterable[Row], make: Callable[[Row], T], skip: bool) -> tuple[list[T], tuple[BadRow, ...]]:
    """Make an example of each row. The first bad row stops everything, unless they are skipped."""
    made: list[T] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            check_no_images(row.values)
            made.append(make(row))
        except BadRowError as error:
            bad.append(BadRow(row.source, row.number, str(error)))
            if not skip:
                raise OnecardError(str(bad[0])) from error
    if not made:
        raise OnecardError(f"none of the {len(bad)} rows can be used. {bad[0]}" if bad else "there are no rows.")
    return made, tuple(bad)


def length_notes(examples: Sequence[Made[Any]], max_length: int) -> tuple[str, ...]:
    answers = [answer for item in examples for answer in item.answers]
    return (
        *count_note(sum(item.prompt_cut for item in examples), len(examples), "prompts were cut at their beginning"),
        *count_note(sum(item.cut for item in answers), len(answers), f"responses were cut at max_length {max_length}"),
        *count_note(sum(item.empty for item in answers), len(answers), EMPTY),
    )


def template_notes(rows: Sequence[Row], tokenizer: Any, examples: Sequence[Made[Any]]) -> tuple[str, ...]:
    """What the chat template does not write: answers as they were sampled, and tools."""
    answers = [answer for item in examples for answer in item.answers]
    left_out = sum(answer.left_out for answer in answers)
    template = str(tokenizer.chat_template or "")
    chats = [row for row in rows if any(isinstance(row.values.get(name), list) for name in MESSAGE_COLUMNS)]
    unwritten = sum(bool(row.values.get("tools")) for row in chats) if template and "tools" not in template else 0
    thoughts = 0
    if template and not any(key in template for key in REASONING) and not opens_thought(tokenizer):
        thoughts = sum(has_thought(row) for row in chats)
    return (
        *count_note(left_out, sum(answer.answers for answer in answers), LEFT_OUT),
        *count_note(unwritten, len(rows), "rows have tools, which the chat template does not write"),
        *count_note(thoughts, len(rows), "rows have thoughts of their own, which the chat template does not write"),
    )


def has_thought(row: Row) -> bool:
    """Whether a message of a row has its thought beside its content."""
    texts = (row.values.get(name) for name in MESSAGE_COLUMNS)
    messages = (message for text in texts if isinstance(text, list) for message in text if isinstance(message, dict))
    return any(map(thought_of, messages))


def count_note(count: int, total: int, what: str) -> tuple[str, ...]:
    """`3 of 100 ...`, or nothing where there are none."""
    return (f"{count} of {total} {what}",) if count else ()


def bad_notes(bad: Sequence[BadRow], total: int) -> tuple[str, ...]:
    more = ["..."] if len(bad) > NAMED_BAD_ROWS else []
    named = "; ".join([*map(str, bad[:NAMED_BAD_ROWS]), *more])
    return count_note(len(bad), total, f"rows are bad and were skipped: {named}")
