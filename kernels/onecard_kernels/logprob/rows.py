"""The rows that a loss runs on: valid tokens, in chunks for matrix products or in blocks for elementwise work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Size of a block of elementwise work. It fits into the CPU cache, so that only the first pass over it reads memory.
BLOCK_BYTES = 4 << 20
CUDA_BLOCK_BYTES = 64 << 20  # larger on CUDA, where each block costs one or more kernel launches


def blocks(rows: int, columns: int, itemsize: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of rows, each of a block's size or less, and of at least one row."""
    size = CUDA_BLOCK_BYTES if device is not None and device.type == "cuda" else BLOCK_BYTES
    step = max(1, size // (columns * itemsize))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Rows:
    """The valid tokens of `[..., D]` hidden states (or logits), fetched a chunk at a time.

    The input is never copied as a whole. A chunk is a view if the input is unmasked and can be viewed as `[tokens, D]`
    (`hidden[:, :-1]` cannot), else a copy of the chunk's rows.
    """

    def __init__(self, shape: torch.Size, mask: Tensor | None) -> None:
        self.shape = shape
        self.index = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
        self.total = shape.numel()  # all tokens
        self.count = self.total if self.index is None else self.index.numel()  # valid tokens

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """The fewest slices of at most `size` valid rows from `start` to `stop`, equal in size up to the last."""
        stop = self.count if stop is None else stop
        if start >= stop:
            return
        pieces = -(-(stop - start) // max(1, size))
        step = -(-(stop - start) // pieces)
        yield from (slice(at, min(at + step, stop)) for at in range(start, stop, step))

    def chosen_first(self, chosen: Tensor) -> tuple[Rows, int]:
        """The valid rows reordered, with the `chosen` ones (bool [valid]) first, and the number of these."""
        index = torch.arange(self.total, device=chosen.device) if self.index is None else self.index
        reordered = Rows(self.shape, None)
        reordered.index, reordered.count = index[chosen.logical_not().argsort(stable=True)], self.count
        return reordered, int(chosen.sum())

    def take(self, source: Tensor, piece: slice) -> Tensor:
        """Rows `piece` of the valid rows of source `[..., K]`."""
        flat = flat_view(source)
        if flat is not None:
            return flat[piece] if self.index is None else flat.index_select(0, self.index[piece])
        return source[torch.unravel_index(self._indices(piece, source), self.shape)]

    def put(self, into: Tensor, piece: slice, values: Tensor) -> None:
        """Write rows `piece` of the valid rows of `into [..., K]`, cast to its dtype."""
        values = values.to(into.dtype)
        flat = flat_view(into)
        if flat is not None and self.index is None:
            flat[piece] = values
        elif flat is not None:
            flat.index_copy_(0, self._indices(piece, into), values)
        else:
            into[torch.unravel_index(self._indices(piece, into), self.shape)] = values

    def select_valid(self, per_token: Tensor) -> Tensor:
        """The valid entries of a per-token tensor, as one dimension."""
        flat = per_token.reshape(-1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """Values `[valid, ...]` as `[tokens, ...]`, with zeros where the mask is 0."""
        if self.index is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.index, values)

    def _indices(self, piece: slice, like: Tensor) -> Tensor:
        if self.index is None:
            return torch.arange(piece.start, piece.stop, device=like.device)
        return self.index[piece]


def flat_view(source: Tensor) -> Tensor | None:
    """`[tokens, K]` of source `[..., K]` without a copy, or None."""
    try:
        return source.view(-1, source.shape[-1]) if source.numel() else source.reshape(-1, source.shape[-1])
    except RuntimeError:
        return None
