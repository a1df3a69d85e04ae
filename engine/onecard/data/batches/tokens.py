"""Flat sequences: how they lie, and the one place that pairs a hidden state with the token it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class TokenSequence:
    """One tokenized text. `response_mask[t]` is True where token t is to be learned or scored."""

    tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ResponseTargets:
    """Which flat row predicts which token. `rows`, `targets`, `sequence_ids`: int64 [r], in the order of the tokens."""

    rows: Tensor
    targets: Tensor
    sequence_ids: Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """What a sequence attends to, where some go on from another one's prompt.

    `spans`: of each sequence the flat rows `[start, stop)` that stand before its own; (0, 0) where there are none.
    `key_rows` int64 [k], `cu_seqlens` int32 [S + 1]: those rows and its own, sequence by sequence.
    """

    spans: tuple[tuple[int, int], ...]
    key_rows: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Sequences end to end. `tokens`, `positions` int64 [n]; `cu_seqlens` int32 [S + 1]; `response_mask` bool [n].

    `targets` are made with the record, on the CPU, so that no step waits for the device to count its rows.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...]  # of each sequence: plain integers, for the same reason
    num_targets: tuple[int, ...]  # of each sequence
    targets: ResponseTargets
    shared: SharedPrompts | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest text, with the prompt that it shares."""
        spans = self.shared.spans if self.shared else ((0, 0),) * len(self.lengths)
        return max(own + stop - start for own, (start, stop) in zip(self.lengths, spans, strict=True))


def pack(sequences: Sequence[TokenSequence], continued: Mapping[int, tuple[int, int]] | None = None) -> TokenBatch:
    """Lay sequences end to end (CPU tensors).

    `continued[i] = (j, p)`: the first p tokens of sequence i are those of sequence j before it, and are not laid again.
    """
    continued = continued or {}
    heads = [continued.get(index, (0, 0))[1] for index in range(len(sequences))]
    lengths = tuple(len(sequence) - head for sequence, head in zip(sequences, heads, strict=True))
    starts = [0, *accumulate(lengths)]
    spans = tuple((starts[j], starts[j] + p) for j, p in (continued.get(i, (0, 0)) for i in range(len(sequences))))
    spans = tuple((start, stop) if stop > start else (0, 0) for start, stop in spans)
    mask = torch.tensor(
        [flag for item, head in zip(sequences, heads, strict=True) for flag in item.response_mask[head:]],
        dtype=torch.bool,
    )
    tokens = torch.tensor(
        [token for item, head in zip(sequences, heads, strict=True) for token in item.tokens[head:]], dtype=torch.int64
    )
    positions = torch.cat([torch.arange(head, head + n) for head, n in zip(heads, lengths, strict=True)])
    targets = response_targets(tokens, positions, mask, starts, spans)
    return TokenBatch(
        tokens=tokens,
        positions=positions,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        response_mask=mask,
        lengths=lengths,
        num_targets=tuple(torch.bincount(targets.sequence_ids, minlength=len(sequences)).tolist()),
        targets=targets,
        shared=shared_prompts(starts, spans) if continued else None,
    )


def response_targets(
    tokens: Tensor, positions: Tensor, mask: Tensor, starts: Sequence[int], spans: Sequence[tuple[int, int]]
) -> ResponseTargets:
    """Pair each response token with the row before it. The only shift by one in onecard.

    A response token that opens its sequence has nothing before it and is not predicted. The first own token of a
    sequence that goes on from a prompt is predicted by that prompt's last row.
    """
    places = (mask & (positions > 0)).nonzero().squeeze(1)
    sequence_of = torch.bucketize(places, torch.tensor(starts[1:-1], dtype=places.dtype), right=True)
    opens = places == torch.tensor(starts[:-1])[sequence_of]
    before = torch.tensor([stop for _, stop in spans])[sequence_of]
    return ResponseTargets(torch.where(opens, before, places) - 1, tokens[places], sequence_of)


def shared_prompts(starts: Sequence[int], spans: tuple[tuple[int, int], ...]) -> SharedPrompts:
    """The rows that each sequence attends to: those of its span, then its own."""
    keys = [[*range(*span), *range(*own)] for span, own in zip(spans, pairwise(starts), strict=True)]
    return SharedPrompts(
        spans=spans,
        key_rows=torch.tensor([row for each in keys for row in each], dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *accumulate(map(len, keys))], dtype=torch.int32),
    )


def part(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Sequences `start` to `stop - 1` as a record of their own."""
    first = sum(batch.lengths[:start])
    cut = slice(first, sum(batch.lengths[:stop]))
    if batch.shared is not None:
        raise ValueError("a part of sequences that share prompts is no record of its own")
    of = batch.targets
    predicted = slice(sum(batch.num_targets[:start]), sum(batch.num_targets[:stop]))
    return TokenBatch(
        tokens=batch.tokens[cut],
        positions=batch.positions[cut],
        cu_seqlens=batch.cu_seqlens[start : stop + 1] - first,
        response_mask=batch.response_mask[cut],
        lengths=batch.lengths[start:stop],
        num_targets=batch.num_targets[start:stop],
        targets=ResponseTargets(of.rows[predicted] - first, of.targets[predicted], of.sequence_ids[predicted] - start),
    )


def unpack(batch: TokenBatch) -> list[TokenSequence]:
    """The sequences of a record in which none goes on from another one's prompt."""
    if batch.shared is not None:
        raise ValueError("sequences that share prompts are not whole")
    tokens, mask = (each.split(list(batch.lengths)) for each in (batch.tokens, batch.response_mask))
    return [TokenSequence(tuple(t.tolist()), tuple(m.tolist())) for t, m in zip(tokens, mask, strict=True)]


def predicted_tokens(sequence: TokenSequence) -> int:
    """How many rows `response_targets` gives this sequence: what a step's normaliser counts."""
    return sum(sequence.response_mask[1:])


def last_rows(batch: TokenBatch) -> Tensor:
    """The flat row of each sequence's last token, int64 [S]: where a scalar head reads its score."""
    return batch.cu_seqlens[1:].to(torch.int64) - 1


def like_lengths(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of at most `size` items each, of like lengths: little is padded. The longest first: if memory lacks, then
    at once.

    >>> list(like_lengths([3, 9, 4], 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    yield from (order[start : start + size] for start in range(0, len(order), size))


def to_device(record: T, device: torch.device) -> T:
    """The same record with every tensor on `device`."""
    moved: dict[str, object] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            moved[item.name] = value.to(device, non_blocking=True)
        elif is_dataclass(value) and not isinstance(value, type):
            moved[item.name] = to_device(value, device)
        else:
            moved[item.name] = value
    return type(record)(**moved)
