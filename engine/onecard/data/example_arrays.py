"""Tokenized examples as flat arrays, in memory or in memory-mapped files.

Two pairs; the first has texts of 3 and 2 tokens, the second of 4 and 4:

    firsts   0           2               4       example i has the texts firsts[i] to firsts[i + 1] - 1
    stops    0     3     5       9      13       text j has the tokens stops[j] to stops[j + 1] - 1
    tokens   a b c d e   f g h i j k l m
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from operator import eq
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from onecard.data.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# record -> its sequences, and a list of its number (margin, score or label), empty if its type has none
SPLIT_RECORD: Mapping[type, Callable[[Any], tuple[Sequence[TokenSequence], Sequence[float]]]] = {
    TokenSequence: lambda sequence: ((sequence,), ()),
    PreferencePair: lambda pair: ((pair.chosen, pair.rejected), (pair.margin,)),
    ScoredSequence: lambda scored: ((scored.sequence,), (scored.score,)),
    Ranking: lambda ranking: (ranking.sequences, ()),
    LabelledSequence: lambda labelled: ((labelled.sequence, labelled.mismatched), (labelled.desirable,)),
}
# the reverse: sequences and number -> record
BUILD_RECORD: Mapping[type, Callable[[tuple[TokenSequence, ...], Sequence[float]], Any]] = {
    TokenSequence: lambda texts, _: texts[0],
    PreferencePair: lambda texts, numbers: PreferencePair(texts[0], texts[1], numbers[0]),
    ScoredSequence: lambda texts, numbers: ScoredSequence(texts[0], numbers[0]),
    Ranking: lambda texts, _: Ranking(texts),
    LabelledSequence: lambda texts, numbers: LabelledSequence(texts[0], bool(numbers[0]), texts[1]),
}
DTYPES = {"tokens": "int32", "response_mask": "bool", "stops": "int64", "firsts": "int64", "numbers": "float64"}


@dataclass(frozen=True)
class Arrays:
    """E examples with S texts of n tokens in all.

    `tokens` int32 [n], `response_mask` bool [n], `stops` int64 [S + 1], `firsts` int64 [E + 1]; `numbers` float64 [E],
    or [0] if examples of this type have none.
    """

    tokens: NDArray[np.int32]
    response_mask: NDArray[np.bool_]
    stops: NDArray[np.int64]
    firsts: NDArray[np.int64]
    numbers: NDArray[np.float64]


class Examples(Sequence[T_co], Generic[T_co]):
    """Records of type `kind`, built when indexed. Record i is example `indices[i]` of the arrays."""

    def __init__(self, kind: type[T_co], arrays: Arrays, indices: Sequence[int] | None = None) -> None:
        self.kind, self.arrays = kind, arrays
        self.indices = range(len(arrays.firsts) - 1) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, position: int) -> T_co: ...
    @overload
    def __getitem__(self, position: slice) -> Examples[T_co]: ...
    def __getitem__(self, position: int | slice) -> T_co | Examples[T_co]:
        if isinstance(position, slice):
            return self.take(range(*position.indices(len(self))))
        sequences = tuple(
            TokenSequence(tuple(tokens.tolist()), tuple(mask.tolist()))
            for tokens, mask in self.sequences(self.indices[position])
        )
        return cast(T_co, BUILD_RECORD[self.kind](sequences, self.numbers(self.indices[position])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def take(self, positions: Sequence[int]) -> Examples[T_co]:
        """The examples at `positions`, in that order."""
        return Examples(self.kind, self.arrays, [self.indices[position] for position in positions])

    def sequences(self, index: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """(tokens int32 [k], response mask bool [k]) of each text of an example."""
        first, stop = self.arrays.firsts[index : index + 2]
        for text in range(first, stop):
            span = slice(*self.arrays.stops[text : text + 2])
            yield self.arrays.tokens[span], self.arrays.response_mask[span]

    def numbers(self, index: int) -> list[float]:
        """A list of the example's margin, score or label; empty if its type has none."""
        return [float(number) for number in self.arrays.numbers[index : index + 1]]

    def lengths(self) -> Iterator[list[int]]:
        """The token counts of each example's texts."""
        lengths, firsts = np.diff(self.arrays.stops).tolist(), self.arrays.firsts.tolist()
        for index in self.indices:
            yield lengths[firsts[index] : firsts[index + 1]]

    def distinct_tokens(self) -> list[int]:
        """The token ids that occur in the arrays."""
        occurs = np.zeros(int(self.arrays.tokens.max(initial=0)) + 1, dtype=bool)
        occurs[self.arrays.tokens] = True
        return [int(token) for token in np.flatnonzero(occurs)] if len(self.arrays.tokens) else []


class ExampleWriter(Generic[T]):
    """Appends examples to the files of a folder, or to memory if `folder` is None."""

    def __init__(self, kind: type[T], folder: Path | None = None) -> None:
        self.kind, self.folder = kind, folder
        self.sinks: dict[str, BinaryIO] = {name: self.open(name) for name in DTYPES}
        self.stops, self.firsts, self.numbers = array("q", [0]), array("q", [0]), array("d")

    def open(self, name: str) -> BinaryIO:
        return BytesIO() if self.folder is None else open(self.folder / name, "wb")

    def add(self, example: T) -> None:
        sequences, numbers = SPLIT_RECORD[self.kind](example)
        for sequence in sequences:
            self.sinks["tokens"].write(array("i", sequence.tokens))
            self.sinks["response_mask"].write(bytes(sequence.response_mask))
            self.stops.append(self.stops[-1] + len(sequence))
        self.firsts.append(self.firsts[-1] + len(sequences))
        self.numbers.extend(numbers)

    def finish(self) -> Examples[T]:
        """The examples that were added."""
        for name in ("stops", "firsts", "numbers"):
            self.sinks[name].write(getattr(self, name))
        if self.folder is None:
            buffers = {name: cast(BytesIO, sink).getbuffer() for name, sink in self.sinks.items()}
            arrays = {name: np.frombuffer(buffers[name], kind) for name, kind in DTYPES.items()}
            return Examples(self.kind, Arrays(**arrays))
        for sink in self.sinks.values():
            sink.close()
        return open_examples(self.kind, self.folder)


def open_examples(kind: type[T], folder: Path) -> Examples[T]:
    """Memory-map the examples that an `ExampleWriter` has written to a folder."""

    def mapped(name: str) -> Any:
        path = folder / name
        if not path.stat().st_size:  # an empty file cannot be mapped
            return np.empty(0, DTYPES[name])
        return np.memmap(path, DTYPES[name], mode="r").view(np.ndarray)

    return Examples(kind, Arrays(**{field.name: mapped(field.name) for field in fields(Arrays)}))


def as_examples(examples: Iterable[T], kind: type[T]) -> Examples[T]:
    """Records as `Examples` in memory."""
    writer = ExampleWriter(kind)
    for example in examples:
        writer.add(example)
    return writer.finish()


def lengths_of(example: object) -> list[int]:
    """The token counts of an example's texts."""
    return [len(sequence) for sequence in SPLIT_RECORD[type(example)](example)[0]]


def all_lengths(examples: Sequence[object]) -> Iterator[list[int]]:
    """`lengths_of` each example."""
    return examples.lengths() if isinstance(examples, Examples) else map(lengths_of, examples)


def all_numbers(examples: Sequence[object]) -> Iterator[Sequence[float]]:
    """For each example, a list of its margin, score or label; empty if its type has none."""
    if isinstance(examples, Examples):
        return map(examples.numbers, examples.indices)
    return (SPLIT_RECORD[type(example)](example)[1] for example in examples)


def all_tokens(examples: Sequence[object]) -> Iterator[Sequence[int]]:
    """Sequences of token ids. Together they have every id that occurs in the examples, but maybe not as often."""
    if isinstance(examples, Examples):
        return iter([examples.distinct_tokens()])
    return (sequence.tokens for example in examples for sequence in SPLIT_RECORD[type(example)](example)[0])


def texts_and_numbers(examples: Iterable[object]) -> Iterator[tuple[list[tuple[Any, Any]], Sequence[float]]]:
    """For each example: (tokens, response mask) of each of its texts, and a list of its number (see `all_numbers`)."""
    if isinstance(examples, Examples):
        for index in examples.indices:
            yield list(examples.sequences(index)), examples.numbers(index)
        return
    for example in examples:
        sequences, numbers = SPLIT_RECORD[type(example)](example)
        yield [(sequence.tokens, sequence.response_mask) for sequence in sequences], numbers
