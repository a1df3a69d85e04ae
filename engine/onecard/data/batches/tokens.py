"""Packed sequences, and the only place that pairs a hidden state with the token it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One tokenized text. `response_mask[t]` is True if token t is learned or scored."""

    tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ResponseTargets:
    """The packed row that predicts each response token: int64 [r] each, in the order of the tokens.

    The hidden state of `rows[i]` predicts the token `targets[i]`, which belongs to sequence `sequence_ids[i]`.
    """

    rows: Tensor
    targets: Tensor
    sequence_ids: Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """The rows that each sequence attends to, in a batch where sequences share another one's prompt.

    `spans`: for each sequence, the packed rows `[start, stop)` of its shared prompt; (0, 0) if it has none.
    `key_rows` int64 [k], `cu_seqlens` int32 [S + 1]: those rows and the sequence's own, sequence by sequence.
    """

    spans: tuple[tuple[int, int], ...]
    key_rows: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """S packed sequences. `tokens`, `positions` int64 [n]; `cu_seqlens` int32 [S + 1]; `response_mask` bool [n].

    `targets` are made with the batch, on the CPU, so that no step waits for the device to count its rows.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...]  # of each sequence: Python integers, for the same reason
    num_targets: tuple[int, ...]  # of each sequence
    targets: ResponseTargets
    shared: SharedPrompts | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, including a shared prompt."""
        spans = self.shared.spans if self.shared else ((0, 0),) * len(self.lengths)
        return max(own + stop - start for own, (start, stop) in zip(self.lengths, spans, strict=True))


def pack(sequences: Sequence[TokenSequence], continued: Mapping[int, tuple[int, int]] | None = None) -> TokenBatch:
    """Pack sequences (CPU tensors).

    `continued[i] = (j, p)`: the first p tokens of sequence i are those of sequence j < i, and are not packed again.
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

    A response token at position 0 is not predicted. The first token of a sequence with a shared prompt is predicted by
    the last row of that prompt.
    """
    indices = (mask & (positions > 0)).nonzero().squeeze(1)
    sequence_ids = torch.bucketize(indices, torch.tensor(starts[1:-1], dtype=indices.dtype), right=True)
    is_first = indices == torch.tensor(starts[:-1])[sequence_ids]
    prompt_stops = torch.tensor([stop for _, stop in spans])[sequence_ids]
    return ResponseTargets(torch.where(is_first, prompt_stops, indices) - 1, tokens[indices], sequence_ids)


def shared_prompts(starts: Sequence[int], spans: tuple[tuple[int, int], ...]) -> SharedPrompts:
    """The rows that each sequence attends to: its shared prompt's, then its own."""
    keys = [[*range(*span), *range(*own)] for span, own in zip(spans, pairwise(starts), strict=True)]
    return SharedPrompts(
        spans=spans,
        key_rows=torch.tensor([row for rows in keys for row in rows], dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *accumulate(map(len, keys))], dtype=torch.int32),
    )


def part(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Sequences `start` to `stop - 1` as a batch. Raises ValueError if the batch has shared prompts."""
    first = sum(batch.lengths[:start])
    rows = slice(first, sum(batch.lengths[:stop]))
    if batch.shared is not None:
        raise ValueError("a part of sequences that share prompts is no record of its own")
    targets = batch.targets
    predicted = slice(sum(batch.num_targets[:start]), sum(batch.num_targets[:stop]))
    return TokenBatch(
        tokens=batch.tokens[rows],
        positions=batch.positions[rows],
        cu_seqlens=batch.cu_seqlens[start : stop + 1] - first,
        response_mask=batch.response_mask[rows],
        lengths=batch.lengths[start:stop],
        num_targets=batch.num_targets[start:stop],
        targets=ResponseTargets(
            targets.rows[predicted] - first, targets.targets[predicted], targets.sequence_ids[predicted] - start
        ),
    )


def unpack(batch: TokenBatch) -> list[TokenSequence]:
    """The sequences of a batch. Raises ValueError if the batch has shared prompts."""
    if batch.shared is not None:
        raise ValueError("sequences that share prompts are not whole")
    tokens, mask = (tensor.split(list(batch.lengths)) for tensor in (batch.tokens, batch.response_mask))
    return [TokenSequence(tuple(t.tolist()), tuple(m.tolist())) for t, m in zip(tokens, mask, strict=True)]


def predicted_tokens(sequence: TokenSequence) -> int:
    """The number of this sequence's rows in `ResponseTargets`; the loss normalizer of a step counts these."""
    return sum(sequence.response_mask[1:])


def last_rows(batch: TokenBatch) -> Tensor:
    """The packed row of each sequence's last token, int64 [S]: the scalar head's input."""
    return batch.cu_seqlens[1:].to(torch.int64) - 1


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length: neighbours need little padding, and memory runs out at the start if it does.

    >>> longest_first([3, 9, 4])
    [1, 2, 0]
    """
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def to_device(record: T, device: torch.device) -> T:
    """The dataclass with every tensor on `device`, also in nested dataclasses."""
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
