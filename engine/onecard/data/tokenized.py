"""Rows in, examples and a plain account of what happened to them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from onecard.batches import PreferencePair, TokenSequence
from onecard.data.examples import BadRowError, preference_row, prompt_row, sft_row
from onecard.data.files import Row
from onecard.data.tokens import Fitted, Tokenizer, preference_tokens, prompt_text, prompt_tokens, sft_tokens
from onecard.errors import OnecardError

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

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
    """Examples in the order of their rows; `notes` say in numbers what was cut, empty, identical or skipped."""

    examples: tuple[T_co, ...]
    notes: tuple[str, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer. `text` is as given, or as the chat template wrote it; `tokens` are what generation is fed.

    `columns` are the row's other columns, which rewards may look at (an expected answer, say).
    """

    text: str
    tokens: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)


def sft_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    completion_only_loss: bool,
    assistant_only_loss: bool,
    skip_bad_rows: bool,
) -> Tokenized[TokenSequence]:
    """SFT rows (`messages`, `prompt` + `completion`, or `text`) as sequences with their response masks.

    `completion_only_loss` learns the completion of prompt + completion rows, else the prompt too;
    `assistant_only_loss` learns the assistant's turns of `messages`, else the whole conversation.
    """

    def make(row: Row) -> Fitted:
        return sft_tokens(
            sft_row(row),
            tokenizer,
            max_length=max_length,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )

    made, bad = collect(rows, make, skip_bad_rows)
    notes = (*length_notes(made, max_length), *bad_notes(bad, len(rows)))
    return Tokenized(tuple(item.sequence for item in made), notes, bad)


def preference_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, skip_bad_rows: bool
) -> Tokenized[PreferencePair]:
    """`prompt`, `chosen`, `rejected` rows (and `margin`) as pairs, each answer cut to `max_length` with its prompt."""

    def make(row: Row) -> tuple[Fitted, Fitted, float]:
        example = preference_row(row)
        return *preference_tokens(example, tokenizer, max_length=max_length), example.margin

    made, bad = collect(rows, make, skip_bad_rows)
    pairs = tuple(PreferencePair(chosen.sequence, rejected.sequence, margin) for chosen, rejected, margin in made)
    identical = sum(pair.chosen == pair.rejected for pair in pairs)
    notes = (
        *length_notes([side for chosen, rejected, _ in made for side in (chosen, rejected)], max_length),
        *count_note(identical, len(pairs), "pairs have the same tokens on both sides"),
        *bad_notes(bad, len(rows)),
    )
    return Tokenized(pairs, notes, bad)


def prompt_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int | None = None, skip_bad_rows: bool = False
) -> Tokenized[Prompt]:
    """`prompt` rows as what generation is fed. A prompt of more than `max_length` tokens is not cut, but a bad row.

    A column that only some rows have is None in the others.
    """
    others = dict.fromkeys(name for row in rows for name in row.values if name != "prompt")

    def make(row: Row) -> Prompt:
        prompt = prompt_row(row).prompt
        tokens = prompt_tokens(prompt, tokenizer)
        if not tokens:
            raise BadRowError("prompt: it has no tokens, so there is nothing to go on from")
        if max_length is not None and len(tokens) > max_length:
            raise BadRowError(f"prompt: {len(tokens)} tokens, expected at most {max_length} beside the response")
        columns = {name: row.values.get(name) for name in others}
        return Prompt(prompt_text(prompt, tokenizer), tuple(tokens), columns)

    made, bad = collect(rows, make, skip_bad_rows)
    return Tokenized(tuple(made), bad_notes(bad, len(rows)), bad)


def collect(rows: Iterable[Row], make: Callable[[Row], T], skip: bool) -> tuple[list[T], tuple[BadRow, ...]]:
    """Make an example of each row. The first bad row stops everything, unless they are skipped."""
    made: list[T] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            made.append(make(row))
        except BadRowError as error:
            bad.append(BadRow(row.source, row.number, str(error)))
            if not skip:
                raise OnecardError(str(bad[0])) from error
    if not made:
        raise OnecardError(f"none of the {len(bad)} rows can be used. {bad[0]}" if bad else "there are no rows.")
    return made, tuple(bad)


def length_notes(made: Sequence[Fitted], max_length: int) -> tuple[str, ...]:
    return (
        *count_note(sum(item.cut for item in made), len(made), f"responses were cut at max_length {max_length}"),
        *count_note(sum(item.empty for item in made), len(made), "responses are empty: only their end is learned"),
    )


def count_note(count: int, total: int, what: str) -> tuple[str, ...]:
    """`3 of 100 ...`, or nothing where there are none."""
    return (f"{count} of {total} {what}",) if count else ()


def bad_notes(bad: Sequence[BadRow], total: int) -> tuple[str, ...]:
    more = ["..."] if len(bad) > NAMED_BAD_ROWS else []
    named = "; ".join([*map(str, bad[:NAMED_BAD_ROWS]), *more])
    return count_note(len(bad), total, f"rows are bad and were skipped: {named}")
