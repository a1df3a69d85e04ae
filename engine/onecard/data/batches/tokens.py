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
    """One tokenized text. `response_mask[t]` is True if token t is trained on, or belongs to a scored response."""

    tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ResponseTargets:
    """Which packed row predicts which response token: three int64 tensors [r], in the order of the tokens.

    The hidden state of `rows[i]` predicts the token `targets[i]`, which belongs to sequence `sequence_ids[i]`.
    """

    rows: Tensor
    targets: Tensor
    sequence_ids: Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """The rows that each sequence attends to, in a batch where sequences share another one's prompt.

    `spans`: for each sequence, the packed rows `[start, stop)` of its shared prompt; (0, 0) if it has none.
    `key_rows` int64 [k]: for each sequence, the rows of its shared prompt and then its own. `cu_seqlens` int32 [S + 1]:
    the offset of each sequence in `key_rows`.
    """

    spans: tuple[tuple[int, int], ...]
    key_rows: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """S packed sequences. `tokens`, `positions` int64 [n]; `cu_seqlens` int32 [S + 1]; `response_mask` bool [n].

    `targets`, `lengths` and `num_targets` are computed on the CPU when the batch is built: on a GPU, counting the rows
    would make each step wait for the device. `lengths` and `num_targets` have one entry for each sequence.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...]
    num_targets: tuple[int, ...]
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


def pack(
    sequences: Sequence[TokenSequence], shared_prefixes: Mapping[int, tuple[int, int]] | None = None
) -> TokenBatch:
    """Pack sequences (CPU tensors).

    `shared_prefixes[i] = (j, p)`: the first p tokens of sequence i equal those of sequence j < i. They are packed once.
    """
    shared_prefixes = shared_prefixes or {}
    prefixes = [shared_prefixes.get(index, (0, 0)) for index in range(len(sequences))]  # (j, p)
    prefix_lengths = [length for _, length in prefixes]
    lengths = tuple(len(sequence) - prefix for sequence, prefix in zip(sequences, prefix_lengths, strict=True))
    starts = [0, *accumulate(lengths)]
    spans = tuple((starts[j], starts[j] + p) for j, p in prefixes)
    spans = tuple((start, stop) if stop > start else (0, 0) for start, stop in spans)
    mask = torch.tensor(
        [flag for item, prefix in zip(sequences, prefix_lengths, strict=True) for flag in item.response_mask[prefix:]],
        dtype=torch.bool,
    )
    tokens = torch.tensor(
        [token for item, prefix in zip(sequences, prefix_lengths, strict=True) for token in item.tokens[prefix:]],
        dtype=torch.int64,
    )
    ranges = zip(prefix_lengths, lengths, strict=True)
    positions = torch.cat([torch.arange(prefix, prefix + length) for prefix, length in ranges])
    targets = response_targets(tokens, positions, mask, starts, spans)
    return TokenBatch(
        tokens=tokens,
        positions=positions,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        response_mask=mask,
        lengths=lengths,
        num_targets=tuple(torch.bincount(targets.sequence_ids, minlength=len(sequences)).tolist()),
        targets=targets,
        shared=shared_prompts(starts, spans) if shared_prefixes else None,
    )


def response_targets(
    tokens: Tensor, positions: Tensor, mask: Tensor, starts: Sequence[int], spans: Sequence[tuple[int, int]]
) -> ResponseTargets:
    """Pair each response token with the row before it. No other code in onecard shifts tokens by one.

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


def slice_sequences(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Sequences `start` to `stop - 1` as a batch. Raises ValueError if the batch has shared prompts."""
    first = sum(batch.lengths[:start])
    rows = slice(first, sum(batch.lengths[:stop]))
    if batch.shared is not None:
        raise ValueError("slice_sequences: the batch has shared prompts; expected a batch without them")
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
        raise ValueError("unpack: the batch has shared prompts; expected a batch without them")
    tokens, mask = (tensor.split(list(batch.lengths)) for tensor in (batch.tokens, batch.response_mask))
    return [TokenSequence(tuple(t.tolist()), tuple(m.tolist())) for t, m in zip(tokens, mask, strict=True)]


def predicted_tokens(sequence: TokenSequence) -> int:
    """The number of response tokens that are predicted: the sequence's rows in `ResponseTargets`."""
    return sum(sequence.response_mask[1:])


def last_rows(batch: TokenBatch) -> Tensor:
    """The packed row of each sequence's last token, int64 [S]: the scalar head's input."""
    return batch.cu_seqlens[1:].to(torch.int64) - 1


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length. Neighbours then need little padding, and the first batch needs the most memory.

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
