"""Rows in, examples of each kind out, with a plain account of what happened to them."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from onecard.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence
from onecard.config import Truncation
from onecard.data.account import CHUNK, Account, Draft, Drafts, Made, Tokenized, count_note, drafts, finished, made
from onecard.data.columns import BadRowError, Messages, Text, is_chat, must_match, template_arguments
from onecard.data.examples import (
    CompletionRow,
    LabelledRow,
    MessagesRow,
    SFTRow,
    labelled_row,
    preference_row,
    prompt_row,
    ranking_row,
    scored_row,
    sft_row,
)
from onecard.data.files import Row, Rows
from onecard.data.kept import GROUP_BYTES, TokenizedExamples, cache_key, kept
from onecard.data.stored import ExampleWriter, all_numbers
from onecard.data.tokens import (
    Fitted,
    Limit,
    Masked,
    Tokenizer,
    Transcript,
    answer_transcript,
    fitted,
    fitted_prompt,
    prompt_transcript,
    sft_transcript,
)
from onecard.errors import OnecardError
from onecard.metrics import progress

T = TypeVar("T")
M = TypeVar("M")

MANY = 5_000  # rows, from which on there is a progress bar
SIDE_BY_SIDE = "rows have the prompt of the row after them, so their answers are not mismatched; shuffle the file"


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer. `text` is as given, or as the chat template wrote it; `tokens` are what generation is fed.

    `columns` are the row's other columns, which rewards may look at (an expected answer, say). `messages` are what
    the prompt was given as, where it was no text, and `arguments` what the chat template was given beside them: a
    classifier may have a chat template of its own.
    """

    text: str
    tokens: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Messages | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def sft_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    completion_only_loss: bool,
    assistant_only_loss: bool,
    skip_bad_rows: bool,
) -> Tokenized[TokenSequence]:
    """SFT rows (`messages`, `prompt` + `completion`, or `text`) as sequences with their response masks.

    `completion_only_loss` learns the completion of prompt + completion rows, else the prompt too;
    `assistant_only_loss` learns the assistant's turns of `messages`, else the whole conversation.
    """
    limit = Limit(max_length, truncation_mode)

    def draft(row: Row) -> Draft[Made[TokenSequence]]:
        example = sft_row(row)
        learn_all = isinstance(example, CompletionRow) and not completion_only_loss
        arguments = template_arguments(row.values, asked(example)[1])
        text = sft_transcript(example, tokenizer, arguments, assistant_only_loss=assistant_only_loss)

        def finish(texts: list[Masked]) -> Made[TokenSequence]:
            answers = fitted(texts, tokenizer, limit, learn_all=learn_all)
            return made(answers[0].sequence, group_of(*asked(example)), answers)

        return Draft([text], finish)

    more = {"completion_only_loss": completion_only_loss, "assistant_only_loss": assistant_only_loss}
    job = Tokenization(TokenSequence, rows, tokenizer, limit, skip_bad_rows, more)
    return job.examples(job.each(draft))


def preference_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
) -> Tokenized[PreferencePair]:
    """`prompt`, `chosen`, `rejected` rows (and `margin`) as pairs, each answer cut to `max_length` with its prompt."""
    limit = Limit(max_length, truncation_mode)

    def draft(row: Row) -> Draft[Made[PreferencePair]]:
        example = preference_row(row)

        def finish(texts: list[Masked]) -> Made[PreferencePair]:
            chosen, rejected = answers = fitted(texts, tokenizer, limit)
            pair = PreferencePair(chosen.sequence, rejected.sequence, example.margin)
            odd = pair.chosen == pair.rejected
            return made(pair, group_of(example.prompt, example.chosen), answers, is_odd=odd)

        return Draft(answers_of(row, example.prompt, [example.chosen, example.rejected], tokenizer), finish)

    job = Tokenization(
        PreferencePair, rows, tokenizer, limit, skip_bad_rows, odd="pairs have the same tokens on both sides"
    )
    return job.examples(job.each(draft))


def scored_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
    bounds: tuple[float, float] | None = None,
) -> Tokenized[ScoredSequence]:
    """`prompt`, `completion`, `score` rows; a score outside `bounds` makes a bad row."""
    limit = Limit(max_length, truncation_mode)

    def draft(row: Row) -> Draft[Made[ScoredSequence]]:
        example = scored_row(row, bounds)

        def finish(texts: list[Masked]) -> Made[ScoredSequence]:
            answers = fitted(texts, tokenizer, limit)
            scored = ScoredSequence(answers[0].sequence, example.score)
            return made(scored, group_of(example.prompt, example.completion), answers)

        return Draft(answers_of(row, example.prompt, [example.completion], tokenizer), finish)

    job = Tokenization(ScoredSequence, rows, tokenizer, limit, skip_bad_rows, {"bounds": bounds})
    return job.examples(job.each(draft))


def ranking_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
) -> Tokenized[Ranking]:
    """`prompt`, `completions` rows: two answers or more, the best first."""
    limit = Limit(max_length, truncation_mode)

    def draft(row: Row) -> Draft[Made[Ranking]]:
        example = ranking_row(row)

        def finish(texts: list[Masked]) -> Made[Ranking]:
            answers = fitted(texts, tokenizer, limit)
            ranking = Ranking(tuple(answer.sequence for answer in answers))
            odd = len(set(ranking.sequences)) < len(ranking.sequences)
            return made(ranking, group_of(example.prompt, example.completions[0]), answers, is_odd=odd)

        return Draft(answers_of(row, example.prompt, example.completions, tokenizer), finish)

    job = Tokenization(Ranking, rows, tokenizer, limit, skip_bad_rows, odd="rankings have answers with the same tokens")
    return job.examples(job.each(draft))


def labelled_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
    mismatched: bool = True,
) -> Tokenized[LabelledSequence]:
    """`prompt`, `completion`, `label` rows. With `mismatched`, an example has a row's prompt with the next row's
    completion too.

    After the last comes the first. What `max_length` takes from a mismatched answer is nobody's data, and not counted.
    """
    limit = Limit(max_length, truncation_mode)
    lenient = replace(limit, truncation_mode="keep_start") if truncation_mode == "error" else limit

    def own(row: Row) -> Draft[tuple[Row, LabelledRow, Fitted]]:
        example = labelled_row(row)
        texts = answers_of(row, example.prompt, [example.completion], tokenizer)
        return Draft(texts, lambda texts: (row, example, fitted(texts, tokenizer, limit)[0]))

    def exchanged(row: Row, example: LabelledRow, answer: Fitted, other: LabelledRow) -> Draft[Made[LabelledSequence]]:
        if mismatched:
            must_match("the next row's completion", other.completion, "prompt", example.prompt)

        def finish(texts: list[Masked]) -> Made[LabelledSequence]:
            swapped = fitted(texts, tokenizer, lenient)[0].sequence if texts else TokenSequence((), ())
            labelled = LabelledSequence(answer.sequence, example.desirable, swapped)
            side_by_side = mismatched and example.prompt == other.prompt
            return made(labelled, group_of(example.prompt, example.completion), [answer], is_odd=side_by_side)

        return Draft(answers_of(row, example.prompt, [other.completion] * mismatched, tokenizer), finish)

    def swapping(good: Iterable[tuple[Row, LabelledRow, Fitted]]) -> Drafts[Made[LabelledSequence]]:
        for (row, example, answer), (after, other, _) in with_next(good):
            if mismatched and row is after:
                raise OnecardError(
                    f"{row}: is the only row to use; expected 2 or more, whose answers can be exchanged."
                )
            try:
                yield row, exchanged(row, example, answer, other)
            except BadRowError as error:
                yield row, error

    job = Tokenization(
        LabelledSequence, rows, tokenizer, limit, skip_bad_rows, {"mismatched": mismatched}, SIDE_BY_SIDE
    )
    find_own = job.each(own)
    found = job.examples(lambda rows, account: job.finished(swapping(find_own(rows, account)), account))
    desirable, count = sum(number for (number,) in all_numbers(found.examples)), len(found.examples)
    uniform = count_note(count if desirable in (0, count) else 0, count, f"labels are {str(desirable > 0).lower()}")
    return replace(found, notes=(*uniform, *found.notes))


def prompt_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool = False,
) -> Tokenized[Prompt]:
    """`prompt` rows as what generation is fed. A prompt of more than `max_length` tokens is a bad row, but with
    keep_end its tokens are cut at their beginning (`text` stays whole).

    A column that only some rows have is None in the others.
    """
    names: dict[str, None] = {}

    def draft(row: Row) -> Draft[Made[Prompt]]:
        prompt = prompt_row(row).prompt
        arguments = template_arguments(row.values, prompt)
        transcript = prompt_transcript(prompt, tokenizer, arguments)
        columns = {name: value for name, value in row.values.items() if name != "prompt"}

        def finish(texts: list[Masked]) -> Made[Prompt]:
            tokens = kept = texts[0].tokens
            if not tokens:
                raise BadRowError("prompt: it has no tokens, so there is nothing to go on from")
            if max_length is not None:
                kept = fitted_prompt(tokens, tokenizer, Limit(max_length, truncation_mode))
            messages = prompt if is_chat(prompt) else None
            example = Prompt(transcript.prefixes[0], tuple(kept), columns, messages, arguments)
            return Made(example, group_of(prompt), prompt_cut=len(kept) < len(tokens))

        return Draft([transcript], finish)

    def named(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            names.update(dict.fromkeys(name for name in row.values if name != "prompt"))
            yield row

    account = Account(tokenizer)
    with counted(rows) as counting:
        found = list(finished(drafts(named(counting), account, draft), tokenizer, account, skip=skip_bad_rows))
    for item in found:
        account.add(item)
    prompts = [
        replace(item.example, columns={name: item.example.columns.get(name) for name in names}) for item in found
    ]
    return Tokenized(prompts, [item.group for item in found], account.notes(max_length or 0), tuple(account.bad))


@dataclass(frozen=True)
class Tokenization(Generic[T]):
    """Rows on their way to examples of a kind: what the examples depend on, and how bad rows are taken.

    `odd` is the note on examples that `is_odd`.
    """

    kind: type[T]
    rows: Iterable[Row]
    tokenizer: Tokenizer
    limit: Limit
    skip_bad_rows: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    odd: str = ""

    def each(self, draft: Callable[[Row], Draft[M]]) -> Callable[[Iterable[Row], Account], Iterator[M]]:
        """What is made of rows, one by one."""
        return lambda rows, account: self.finished(drafts(rows, account, draft), account)

    def finished(self, waiting: Drafts[M], account: Account) -> Iterator[M]:
        return finished(waiting, self.tokenizer, account, skip=self.skip_bad_rows)

    def examples(self, make: Callable[[Iterable[Row], Account], Iterator[Made[T]]]) -> TokenizedExamples[T]:
        """The examples that `make` makes of the rows. Those of many rows are kept on disk for other runs."""

        def write(folder: Path | None) -> TokenizedExamples[T]:
            account, groups, writer = Account(self.tokenizer), list[bytes](), ExampleWriter(self.kind, folder)
            with counted(self.rows) as rows, rare_collections():
                for item in make(rows, account):
                    account.add(item)
                    groups.append(item.group)
                    writer.add(item.example)
            notes = account.notes(self.limit.max_length, self.odd)
            return TokenizedExamples(writer.finish(), groups, notes, tuple(account.bad))

        settings = {**asdict(self.limit), "skip_bad_rows": self.skip_bad_rows, **self.settings}
        return kept(cache_key(self.rows, self.tokenizer, self.kind, settings), self.kind, write)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Inside, Python looks for unreachable cycles less often: rows have none, and looking takes a fifth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def counted(rows: Iterable[Row]) -> Iterator[Iterator[Row]]:
    """The rows with a progress bar, where there are many."""
    total = rows.total if isinstance(rows, Rows) else len(rows) if isinstance(rows, Sequence) else None
    if total is not None and total < MANY:
        yield iter(rows)
        return
    with progress("tokenize", total) as bar:

        def counting() -> Iterator[Row]:
            number = 0
            for number, row in enumerate(rows, start=1):
                yield row
                if number % CHUNK == 0:
                    bar.advance(by=CHUNK)
            bar.advance(by=number % CHUNK)

        yield counting()


def answers_of(row: Row, prompt: Text, answers: Sequence[Text], tokenizer: Tokenizer) -> list[Transcript]:
    """A row's answers to one prompt, each with what the row says to the chat template."""
    arguments = template_arguments(row.values, answers[0]) if answers else {}
    return [answer_transcript(prompt, answer, tokenizer, arguments) for answer in answers]


def with_next(items: Iterable[T]) -> Iterator[tuple[T, T]]:
    """Each item with the one after it, the last one with the first."""
    waiting = iter(items)
    for first in waiting:
        last = first
        for item in waiting:
            yield last, item
            last = item
        yield last, first


def group_of(*texts: Text) -> bytes:
    """A digest of the first of the texts that holds anything: the prompt, or what stands for it where it is empty."""
    text = json.dumps(next((text for text in texts if text), ""), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=GROUP_BYTES).digest()


def asked(row: SFTRow) -> tuple[Text, Text]:
    """The prompt of an SFT row, and the text that stands for it where there is none."""
    if isinstance(row, CompletionRow):
        return row.prompt, row.completion
    if isinstance(row, MessagesRow):
        turns = (place for place, message in enumerate(row.messages) if message["role"] == "assistant")
        return row.messages[: next(turns, 0)], row.messages
    return "", row.text
