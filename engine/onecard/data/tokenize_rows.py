"""Tokenize rows in batches: the tokenizer is faster on many texts at once.

rows -> pending examples (texts) -> token ids of a batch -> examples, with a data report
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from onecard.data.columns import BadRowError, check_no_images
from onecard.data.data_report import BadRow, BuiltExample, DataReport
from onecard.data.example_arrays import ExampleWriter
from onecard.data.files import Row, Rows
from onecard.data.token_cache import TokenizedExamples, cache_key, cached
from onecard.data.tokens import (
    LengthLimit,
    MaskedTokens,
    Tokenizer,
    Transcript,
    encode,
    encode_transcripts,
    is_transformers_fast,
    mask_transcripts,
)
from onecard.utils.errors import OnecardError
from onecard.utils.progress import progress

T = TypeVar("T")
M = TypeVar("M")
T_co = TypeVar("T_co", covariant=True)

BATCH_ROWS = 256  # rows tokenized in one call; three such batches are in memory
PROGRESS_ROWS = 5_000  # rows from which there is a progress bar


@dataclass(frozen=True)
class PendingExample(Generic[T_co]):
    """A row before tokenization: its texts, and the function that builds the example from their token ids."""

    transcripts: Sequence[Transcript]
    build: Callable[[list[MaskedTokens]], T_co]


Pending: TypeAlias = Iterable[tuple[Row, PendingExample[T] | Exception]]  # an exception for a row that cannot be used
PendingBatch: TypeAlias = list[tuple[Row, PendingExample[T] | Exception]]


def pending_examples(
    rows: Iterable[Row], report: DataReport, prepare: Callable[[Row], PendingExample[T]]
) -> Pending[T]:
    """Apply `prepare` to each row. Errors are yielded like examples; `build_examples` handles them in row order."""
    for row in rows:
        report.add_row(row)
        try:
            check_no_images(row.values)
            yield row, prepare(row)
        except (BadRowError, OnecardError) as error:
            yield row, error


def tokenized_batches(
    pending: Pending[T], tokenizer: Tokenizer
) -> Iterator[tuple[PendingBatch[T], list[MaskedTokens]]]:
    """Batches of rows, each with the ids and masks of its texts.

    A thread encodes the next batch while the caller builds the examples of this one, with transformers' fast
    tokenizers. Others may not be thread-safe. If reading a row raises an error, the batches before it come first.
    """
    rows, in_thread = iter(pending), is_transformers_fast(tokenizer)
    # The first call removes a truncation that the tokenizer's file may set. Later it would wait for the thread's batch.
    encode("a", tokenizer)
    with ThreadPoolExecutor(max_workers=1) as pool:

        def read() -> tuple[PendingBatch[T], list[Transcript], Callable[[], dict[str, list[int]]]]:
            batch = list(islice(rows, BATCH_ROWS))
            transcripts = [text for _, item in batch if isinstance(item, PendingExample) for text in item.transcripts]
            if in_thread:
                return batch, transcripts, pool.submit(encode_transcripts, transcripts, tokenizer).result
            return batch, transcripts, partial(encode_transcripts, transcripts, tokenizer)

        following = read()
        while following[0]:
            (batch, transcripts, encoded), failure = following, None
            try:
                following = read()
            except Exception as error:
                failure = error
            yield batch, mask_transcripts(transcripts, encoded(), tokenizer)
            if failure is not None:
                raise failure


def build_examples(pending: Pending[T], tokenizer: Tokenizer, report: DataReport, *, skip: bool) -> Iterator[T]:
    """Tokenize pending examples in batches and build them.

    Raises OnecardError at the first bad row unless `skip`, and if no row can be used.
    """
    for batch, tokenized in tokenized_batches(pending, tokenizer):
        texts = iter(tokenized)
        for row, item in batch:
            try:
                if isinstance(item, Exception):
                    raise item
                built = item.build([next(texts) for _ in item.transcripts])
            except BadRowError as error:
                report.bad.append(BadRow(row.source, row.number, str(error)))
                if not skip:
                    raise OnecardError(str(report.bad[-1])) from error
                continue
            yield built
    if len(report.bad) == report.rows:
        bad = report.bad
        raise OnecardError(f"none of the {len(bad)} rows can be used. {bad[0]}" if bad else "there are no rows.")


@dataclass(frozen=True)
class Tokenization(Generic[T]):
    """Tokenization of rows into examples of type `kind`, with all settings that the examples depend on.

    `settings`: those of this kind alone. `suspicious_note`: the note on examples that are `is_suspicious`.
    """

    kind: type[T]
    rows: Iterable[Row]
    tokenizer: Tokenizer
    limit: LengthLimit
    skip_bad_rows: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    suspicious_note: str = ""

    def examples(self, prepare: Callable[[Row], PendingExample[BuiltExample[T]]]) -> TokenizedExamples[T]:
        """One example for each row."""
        return self.examples_from(lambda rows, report: self.build(pending_examples(rows, report, prepare), report))

    def build(self, pending: Pending[M], report: DataReport) -> Iterator[M]:
        """`build_examples` with this tokenizer."""
        return build_examples(pending, self.tokenizer, report, skip=self.skip_bad_rows)

    def examples_from(
        self, make: Callable[[Iterable[Row], DataReport], Iterator[BuiltExample[T]]]
    ) -> TokenizedExamples[T]:
        """The examples that `make` yields, or those that an earlier run wrote into the token cache."""

        def write(folder: Path | None) -> TokenizedExamples[T]:
            report, groups, writer = DataReport(self.tokenizer), list[bytes](), ExampleWriter(self.kind, folder)
            with with_progress(self.rows) as rows, fewer_garbage_collections():
                for item in make(rows, report):
                    report.add(item)
                    groups.append(item.group)
                    writer.add(item.example)
            notes = report.notes(self.limit.max_length, self.suspicious_note)
            return TokenizedExamples(writer.finish(), groups, notes, tuple(report.bad))

        settings = {**asdict(self.limit), "skip_bad_rows": self.skip_bad_rows, **self.settings}
        return cached(cache_key(self.rows, self.tokenizer, self.kind, settings), self.kind, write)


@contextmanager
def fewer_garbage_collections() -> Iterator[None]:
    """Context with fewer garbage collections: rows have no cycles, and collections took a fifth of the run time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def with_progress(rows: Iterable[Row]) -> Iterator[Iterator[Row]]:
    """The rows, with a progress bar if there are many."""
    total = rows.total if isinstance(rows, Rows) else len(rows) if isinstance(rows, Sequence) else None
    if total is not None and total < PROGRESS_ROWS:
        yield iter(rows)
        return
    with progress("tokenize", total) as bar:

        def advancing() -> Iterator[Row]:
            number = 0
            for number, row in enumerate(rows, start=1):
                yield row
                if number % BATCH_ROWS == 0:
                    bar.advance(by=BATCH_ROWS)
            bar.advance(by=number % BATCH_ROWS)

        yield advancing()
