"""The rows that a loss runs on: the valid tokens of a batch, in chunks and in blocks of elementwise work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of one elementwise block: the passes over a block (max, softmax, sums) hit the cache that the first one filled.
BLOCK_BYTES = 4 << 20
CUDA_BLOCK_BYTES = 64 << 20  # on CUDA a block costs a launch or more


def blocks(rows: int, columns: int, itemsize: int, device: torch.device | None = None) -> Iterator[slice]:
    size = CUDA_BLOCK_BYTES if device is not None and device.type == "cuda" else BLOCK_BYTES
    step = max(1, size // (columns * itemsize))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Rows:
    """The valid tokens of `[..., D]` hidden states (or logits), fetched a chunk at a time.

    Nothing the size of the input is ever copied: a chunk is a view where the input is flat and unmasked, and a gather
    of its own rows otherwise (`hidden[:, :-1]` cannot be viewed as `[tokens, D]`).
    """

    def __init__(self, shape: torch.Size, mask: Tensor | None) -> None:
        self.shape = shape
        self.index = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
        self.total = shape.numel()
        self.count = self.total if self.index is None else self.index.numel()

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Slices of equal size, of all valid rows or of those from `start` to `stop`, so that no GEMM is a sliver."""
        stop = self.count if stop is None else stop
        if start >= stop:
            return
        pieces = -(-(stop - start) // max(1, size))
        step = -(-(stop - start) // pieces)
        yield from (slice(at, min(at + step, stop)) for at in range(start, stop, step))

    def first(self, chosen: Tensor) -> tuple[Rows, int]:
        """The same rows, those that are `chosen` (bool, of the valid rows) first, and how many these are."""
        index = torch.arange(self.total, device=chosen.device) if self.index is None else self.index
        reordered = Rows(self.shape, None)
        reordered.index, reordered.count = index[chosen.logical_not().argsort(stable=True)], self.count
        return reordered, int(chosen.sum())

    def take(self, source: Tensor, piece: slice) -> Tensor:
        """Rows `piece` of the valid rows of source `[..., K]`."""
        flat = flat_view(source)
        if flat is not None:
            return flat[piece] if self.index is None else flat.index_select(0, self.index[piece])
        return source[torch.unravel_index(self._at(piece, source), self.shape)]

    def put(self, into: Tensor, piece: slice, values: Tensor) -> None:
        """Write rows `piece` of the valid rows of `into [..., K]`, cast to its dtype."""
        values = values.to(into.dtype)
        flat = flat_view(into)
        if flat is not None and self.index is None:
            flat[piece] = values
        elif flat is not None:
            flat.index_copy_(0, self._at(piece, into), values)
        else:
            into[torch.unravel_index(self._at(piece, into), self.shape)] = values

    def pick(self, per_token: Tensor) -> Tensor:
        """The valid entries of a per-token tensor, flat."""
        flat = per_token.reshape(-1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """`[valid, ...]` back to all tokens, still flat, with zeros where the mask is 0."""
        if self.index is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.index, values)

    def _at(self, piece: slice, like: Tensor) -> Tensor:
        if self.index is None:
            return torch.arange(piece.start, piece.stop, device=like.device)
        return self.index[piece]


def flat_view(source: Tensor) -> Tensor | None:
    """`[tokens, K]` of source `[..., K]` without a copy, or None."""
    try:
        return source.view(-1, source.shape[-1]) if source.numel() else source.reshape(-1, source.shape[-1])
    except RuntimeError:
        return None
