"""Tokenize rows into the examples of each kind of training, with a data report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

from onecard.config import Truncation
from onecard.data.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence
from onecard.data.columns import BadRowError, Messages, Text, check_same_form, is_chat, template_arguments
from onecard.data.data_report import BuiltExample, DataReport, Tokenized, built_example, count_note
from onecard.data.example_arrays import all_numbers
from onecard.data.files import Row
from onecard.data.token_cache import GROUP_BYTES, TokenizedExamples
from onecard.data.tokenize_rows import (
    Pending,
    PendingExample,
    Tokenization,
    build_examples,
    pending_examples,
    with_progress,
)
from onecard.data.tokens import (
    LengthLimit,
    MaskedTokens,
    Tokenizer,
    Transcript,
    TruncatedAnswer,
    answer_transcript,
    prompt_transcript,
    sft_transcript,
    truncate_answers,
    truncate_prompt,
)
from onecard.data.typed_rows import (
    CompletionRow,
    LabelledRow,
    MessagesRow,
    SFTRow,
    labelled_row,
    preference_row,
    ranking_row,
    row_prompt,
    scored_row,
    sft_row,
)
from onecard.utils.errors import OnecardError

T = TypeVar("T")

SAME_PROMPT_NOTE = "rows have the prompt of the next row, so its answer is not a mismatched one; shuffle the file"


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer. `text`: the row's text, or its messages rendered by the chat template. `tokens`: its ids.

    `columns`: the row's other columns, for rewards (an expected answer, for example). `messages`: the prompt's
    messages, or None for a text; a reward classifier with a chat template of its own renders them again. `arguments`:
    arguments of the chat template besides the messages.
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

    `completion_only_loss`: only the completion of `prompt` + `completion` rows is learned, not the prompt.
    `assistant_only_loss`: only the assistant's turns of `messages` are learned, not the whole conversation.
    """
    limit = LengthLimit(max_length, truncation_mode)

    def prepare(row: Row) -> PendingExample[BuiltExample[TokenSequence]]:
        example = sft_row(row)
        learn_all = isinstance(example, CompletionRow) and not completion_only_loss
        arguments = template_arguments(row.values, group_texts(example)[1])
        transcript = sft_transcript(example, tokenizer, arguments, assistant_only_loss=assistant_only_loss)

        def build(tokenized: list[MaskedTokens]) -> BuiltExample[TokenSequence]:
            answers = truncate_answers(tokenized, tokenizer, limit, learn_all=learn_all)
            return built_example(answers[0].sequence, group_of(*group_texts(example)), answers)

        return PendingExample([transcript], build)

    settings = {"completion_only_loss": completion_only_loss, "assistant_only_loss": assistant_only_loss}
    job = Tokenization(TokenSequence, rows, tokenizer, limit, skip_bad_rows, settings)
    return job.examples(prepare)


def answer_examples(
    job: Tokenization[T], parse: Callable[[Row], tuple[Text, Sequence[Text], Callable[..., T]]]
) -> TokenizedExamples[T]:
    """One example for each row, which has a prompt and its answers. With two equal answers it is `is_suspicious`.

    `parse(row)` returns the prompt, its answers, and the function that builds the example from the answers' sequences.
    """

    def prepare(row: Row) -> PendingExample[BuiltExample[T]]:
        prompt, texts, example_of = parse(row)

        def build(tokenized: list[MaskedTokens]) -> BuiltExample[T]:
            answers = truncate_answers(tokenized, job.tokenizer, job.limit)
            sequences = [answer.sequence for answer in answers]
            equal = any(first == second for first, second in combinations(sequences, 2))
            return built_example(example_of(*sequences), group_of(prompt, texts[0]), answers, is_suspicious=equal)

        return PendingExample(answers_of(row, prompt, texts, job.tokenizer), build)

    return job.examples(prepare)


def preference_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
) -> Tokenized[PreferencePair]:
    """Rows with `prompt`, `chosen`, `rejected` (and `margin`) as pairs. `max_length`: of a prompt with one answer."""

    def parse(row: Row) -> tuple[Text, Sequence[Text], Callable[..., PreferencePair]]:
        pair = preference_row(row)
        return pair.prompt, (pair.chosen, pair.rejected), partial(PreferencePair, margin=pair.margin)

    limit, note = LengthLimit(max_length, truncation_mode), "pairs have the same tokens on both sides"
    job = Tokenization(PreferencePair, rows, tokenizer, limit, skip_bad_rows, suspicious_note=note)
    return answer_examples(job, parse)


def scored_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
    bounds: tuple[float, float] | None = None,
) -> Tokenized[ScoredSequence]:
    """Rows with `prompt`, `completion`, `score` as scored answers. A row with a score outside `bounds` is bad."""

    def parse(row: Row) -> tuple[Text, Sequence[Text], Callable[..., ScoredSequence]]:
        answer = scored_row(row, bounds)
        return answer.prompt, (answer.completion,), partial(ScoredSequence, score=answer.score)

    limit, settings = LengthLimit(max_length, truncation_mode), {"bounds": bounds}
    return answer_examples(Tokenization(ScoredSequence, rows, tokenizer, limit, skip_bad_rows, settings), parse)


def ranking_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
) -> Tokenized[Ranking]:
    """Rows with `prompt` and `completions` (two or more answers, best first) as rankings."""

    def parse(row: Row) -> tuple[Text, Sequence[Text], Callable[..., Ranking]]:
        ranking = ranking_row(row)
        return ranking.prompt, ranking.completions, lambda *sequences: Ranking(sequences)

    limit, note = LengthLimit(max_length, truncation_mode), "rankings have answers with the same tokens"
    job = Tokenization(Ranking, rows, tokenizer, limit, skip_bad_rows, suspicious_note=note)
    return answer_examples(job, parse)


def labelled_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
    mismatched: bool = True,
) -> Tokenized[LabelledSequence]:
    """Rows with `prompt`, `completion`, `label` as labelled answers.

    `mismatched`: each example also has its row's prompt with the next row's completion; the first row is next after the
    last. If a mismatched answer is too long, it is cut, and the report does not count it. Raises OnecardError if
    `mismatched` and only one row can be used.
    """
    limit = LengthLimit(max_length, truncation_mode)
    mismatched_limit = replace(limit, truncation_mode="keep_start") if truncation_mode == "error" else limit

    def prepare_answer(row: Row) -> PendingExample[tuple[Row, LabelledRow, TruncatedAnswer]]:
        example = labelled_row(row)
        transcripts = answers_of(row, example.prompt, [example.completion], tokenizer)
        return PendingExample(transcripts, lambda texts: (row, example, truncate_answers(texts, tokenizer, limit)[0]))

    def prepare_mismatched(
        row: Row, example: LabelledRow, answer: TruncatedAnswer, next_example: LabelledRow
    ) -> PendingExample[BuiltExample[LabelledSequence]]:
        if mismatched:
            check_same_form("the next row's completion", next_example.completion, "prompt", example.prompt)

        def build(texts: list[MaskedTokens]) -> BuiltExample[LabelledSequence]:
            other = TokenSequence((), ())
            if mismatched:
                other = truncate_answers(texts, tokenizer, mismatched_limit)[0].sequence
            labelled = LabelledSequence(answer.sequence, example.desirable, other)
            same_prompt = mismatched and example.prompt == next_example.prompt
            group = group_of(example.prompt, example.completion)
            return built_example(labelled, group, [answer], is_suspicious=same_prompt)

        return PendingExample(answers_of(row, example.prompt, [next_example.completion] * mismatched, tokenizer), build)

    def with_mismatched(
        answers: Iterable[tuple[Row, LabelledRow, TruncatedAnswer]],
    ) -> Pending[BuiltExample[LabelledSequence]]:
        for (row, example, answer), (next_row, next_example, _) in with_next(answers):
            if mismatched and row is next_row:
                raise OnecardError(
                    f"{row}: is the only usable row; expected 2 or more: KTO uses the answer of another row too."
                )
            try:
                yield row, prepare_mismatched(row, example, answer, next_example)
            except BadRowError as error:
                yield row, error

    job = Tokenization(
        LabelledSequence, rows, tokenizer, limit, skip_bad_rows, {"mismatched": mismatched}, SAME_PROMPT_NOTE
    )

    def make(rows: Iterable[Row], report: DataReport) -> Iterator[BuiltExample[LabelledSequence]]:
        return job.build(with_mismatched(job.build(pending_examples(rows, report, prepare_answer), report)), report)

    tokenized = job.examples_from(make)
    examples = tokenized.examples
    desirable, count = sum(number for (number,) in all_numbers(examples)), len(examples)
    uniform = count_note(count if desirable in (0, count) else 0, count, f"labels are {str(desirable > 0).lower()}")
    return replace(tokenized, notes=(*uniform, *tokenized.notes))


def prompt_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool = False,
) -> Tokenized[Prompt]:
    """Rows with `prompt` as prompts for generation.

    A row whose prompt has more than `max_length` tokens is bad. With keep_end, the first tokens are cut instead, but
    `text` keeps the whole prompt. A column that only some rows have is None for the others.
    """
    names: dict[str, None] = {}

    def prepare(row: Row) -> PendingExample[BuiltExample[Prompt]]:
        prompt = row_prompt(row)
        arguments = template_arguments(row.values, prompt)
        transcript = prompt_transcript(prompt, tokenizer, arguments)
        columns = {name: value for name, value in row.values.items() if name != "prompt"}

        def build(texts: list[MaskedTokens]) -> BuiltExample[Prompt]:
            tokens = truncated = texts[0].tokens
            if not tokens:
                raise BadRowError("prompt: it has no tokens; expected one or more")
            if max_length is not None:
                truncated = truncate_prompt(tokens, tokenizer, LengthLimit(max_length, truncation_mode))
            messages = prompt if is_chat(prompt) else None
            example = Prompt(transcript.prefixes[0], tuple(truncated), columns, messages, arguments)
            return BuiltExample(example, group_of(prompt), prompt_cut=len(truncated) < len(tokens))

        return PendingExample([transcript], build)

    def named(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            names.update(dict.fromkeys(name for name in row.values if name != "prompt"))
            yield row

    report = DataReport(tokenizer)
    with with_progress(rows) as reading:
        pending = pending_examples(named(reading), report, prepare)
        items = list(build_examples(pending, tokenizer, report, skip=skip_bad_rows))
    for item in items:
        report.add(item)
    prompts = [
        replace(item.example, columns={name: item.example.columns.get(name) for name in names}) for item in items
    ]
    return Tokenized(prompts, [item.group for item in items], report.notes(max_length or 0), tuple(report.bad))


def answers_of(row: Row, prompt: Text, answers: Sequence[Text], tokenizer: Tokenizer) -> list[Transcript]:
    """The transcripts of a row's answers to one prompt. The chat template gets the row's arguments."""
    arguments = template_arguments(row.values, answers[0]) if answers else {}
    return [answer_transcript(prompt, answer, tokenizer, arguments) for answer in answers]


def with_next(items: Iterable[T]) -> Iterator[tuple[T, T]]:
    """Each item with the next one; the last item with the first."""
    iterator = iter(items)
    for first in iterator:
        current = first
        for item in iterator:
            yield current, item
            current = item
        yield current, first


def group_of(*texts: Text) -> bytes:
    """A digest of the first text that is not empty (`Tokenized.groups`). Callers pass the prompt first."""
    text = json.dumps(next((text for text in texts if text), ""), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=GROUP_BYTES).digest()


def group_texts(row: SFTRow) -> tuple[Text, Text]:
    """The texts that `group_of` takes for an SFT row: its prompt, and a text in case the prompt is empty."""
    if isinstance(row, CompletionRow):
        return row.prompt, row.completion
    if isinstance(row, MessagesRow):
        turns = (index for index, message in enumerate(row.messages) if message["role"] == "assistant")
        return row.messages[: next(turns, 0)], row.messages
    return "", row.text
