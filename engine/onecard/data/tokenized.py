"""Rows in, examples of each kind out, with a plain account of what happened to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onecard.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence
from onecard.config import Truncation
from onecard.data.account import Made, Tokenized, collect, count_note, made, tokenized
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
from onecard.data.files import Row
from onecard.data.tokens import (
    Fitted,
    Limit,
    Tokenizer,
    answer_tokens,
    fitted_prompt,
    prompt_text,
    prompt_tokens,
    sft_tokens,
)
from onecard.errors import OnecardError

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
    rows: Sequence[Row],
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

    def make(row: Row) -> Made[TokenSequence]:
        example = sft_row(row)
        answer = sft_tokens(
            example,
            tokenizer,
            limit,
            template_arguments(row.values, asked(example)[1]),
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )
        return made(answer.sequence, group_of(*asked(example)), [answer])

    return tokenized(rows, tokenizer, *collect(rows, make, skip_bad_rows), max_length)


def preference_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
) -> Tokenized[PreferencePair]:
    """`prompt`, `chosen`, `rejected` rows (and `margin`) as pairs, each answer cut to `max_length` with its prompt."""
    limit = Limit(max_length, truncation_mode)

    def make(row: Row) -> Made[PreferencePair]:
        example = preference_row(row)
        arguments = template_arguments(row.values, example.chosen)
        answers = answer_tokens(example.prompt, [example.chosen, example.rejected], tokenizer, limit, arguments)
        chosen, rejected = answers
        pair = PreferencePair(chosen.sequence, rejected.sequence, example.margin)
        return made(pair, group_of(example.prompt, example.chosen), answers)

    pairs, bad = collect(rows, make, skip_bad_rows)
    identical = sum(pair.example.chosen == pair.example.rejected for pair in pairs)
    note = count_note(identical, len(pairs), "pairs have the same tokens on both sides")
    return tokenized(rows, tokenizer, pairs, bad, max_length, note)


def scored_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
    bounds: tuple[float, float] | None = None,
) -> Tokenized[ScoredSequence]:
    """`prompt`, `completion`, `score` rows; a score outside `bounds` makes a bad row."""
    limit = Limit(max_length, truncation_mode)

    def make(row: Row) -> Made[ScoredSequence]:
        example = scored_row(row, bounds)
        arguments = template_arguments(row.values, example.completion)
        answers = answer_tokens(example.prompt, [example.completion], tokenizer, limit, arguments)
        scored = ScoredSequence(answers[0].sequence, example.score)
        return made(scored, group_of(example.prompt, example.completion), answers)

    return tokenized(rows, tokenizer, *collect(rows, make, skip_bad_rows), max_length)


def ranking_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation_mode: Truncation = "keep_start",
    skip_bad_rows: bool,
) -> Tokenized[Ranking]:
    """`prompt`, `completions` rows: two answers or more, the best first."""
    limit = Limit(max_length, truncation_mode)

    def make(row: Row) -> Made[Ranking]:
        example = ranking_row(row)
        arguments = template_arguments(row.values, example.completions[0])
        answers = answer_tokens(example.prompt, example.completions, tokenizer, limit, arguments)
        ranking = Ranking(tuple(answer.sequence for answer in answers))
        return made(ranking, group_of(example.prompt, example.completions[0]), answers)

    rankings, bad = collect(rows, make, skip_bad_rows)
    identical = sum(len(set(item.example.sequences)) < len(item.example.sequences) for item in rankings)
    note = count_note(identical, len(rankings), "rankings have answers with the same tokens")
    return tokenized(rows, tokenizer, rankings, bad, max_length, note)


def labelled_examples(
    rows: Sequence[Row],
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

    def own(row: Row) -> tuple[Row, LabelledRow, Fitted]:
        example = labelled_row(row)
        arguments = template_arguments(row.values, example.completion)
        return row, example, answer_tokens(example.prompt, [example.completion], tokenizer, limit, arguments)[0]

    good, bad = collect(rows, own, skip_bad_rows)
    if mismatched and len(good) < 2:
        raise OnecardError(f"{good[0][0]}: is the only row to use; expected 2 or more, whose answers can be exchanged.")
    neighbours = {str(one[0]): (one, other[1]) for one, other in zip(good, [*good[1:], good[0]], strict=True)}

    def make(row: Row) -> Made[LabelledSequence]:
        (_, example, answer), other = neighbours[str(row)]
        exchanged = TokenSequence((), ())
        if mismatched:
            must_match("the next row's completion", other.completion, "prompt", example.prompt)
            arguments = template_arguments(row.values, example.completion)
            answers = answer_tokens(example.prompt, [other.completion], tokenizer, lenient, arguments)
            exchanged = answers[0].sequence
        labelled = LabelledSequence(answer.sequence, example.desirable, exchanged)
        return made(labelled, group_of(example.prompt, example.completion), [answer])

    examples, unmatched = collect([row for row, *_ in good], make, skip_bad_rows)
    desirable, count = sum(item.example.desirable for item in examples), len(examples)
    same = sum(one.prompt == other.prompt for (_, one, _), other in neighbours.values())
    notes = (
        *count_note(count if desirable in (0, count) else 0, count, f"labels are {str(desirable > 0).lower()}"),
        *count_note(same if mismatched else 0, count, SIDE_BY_SIDE),
    )
    return tokenized(rows, tokenizer, examples, bad + unmatched, max_length, notes)


def prompt_examples(
    rows: Sequence[Row],
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
    others = dict.fromkeys(name for row in rows for name in row.values if name != "prompt")

    def make(row: Row) -> Made[Prompt]:
        prompt = prompt_row(row).prompt
        arguments = template_arguments(row.values, prompt)
        tokens = prompt_tokens(prompt, tokenizer, arguments)
        if not tokens:
            raise BadRowError("prompt: it has no tokens, so there is nothing to go on from")
        kept = tokens if max_length is None else fitted_prompt(tokens, tokenizer, Limit(max_length, truncation_mode))
        columns = {name: row.values.get(name) for name in others}
        messages = prompt if is_chat(prompt) else None
        text = prompt_text(prompt, tokenizer, arguments)
        example = Prompt(text, tuple(kept), columns, messages, arguments)
        return Made(example, group_of(prompt), prompt_cut=len(kept) < len(tokens))

    return tokenized(rows, tokenizer, *collect(rows, make, skip_bad_rows), max_length or 0)


def group_of(*texts: Text) -> str:
    """The first of the texts that holds anything: the prompt, or what stands for it where it is empty."""
    return json.dumps(next((text for text in texts if text), ""), sort_keys=True, default=str)


def asked(row: SFTRow) -> tuple[Text, Text]:
    """The prompt of an SFT row, and the text that stands for it where there is none."""
    if isinstance(row, CompletionRow):
        return row.prompt, row.completion
    if isinstance(row, MessagesRow):
        turns = (place for place, message in enumerate(row.messages) if message["role"] == "assistant")
        return row.messages[: next(turns, 0)], row.messages
    return "", row.text
