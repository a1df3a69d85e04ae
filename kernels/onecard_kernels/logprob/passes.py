"""The row pass every torch path is made of, and the rows it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows of one elementwise block: the passes over a block (max, softmax, sums) hit the cache that the first one filled.
BLOCK_BYTES = 4 << 20
CUDA_BLOCK_BYTES = 64 << 20  # there a block is a launch or more


class RowStats(NamedTuple):
    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None


def blocks(rows: int, columns: int, itemsize: int, device: torch.device | None = None) -> Iterator[slice]:
    size = CUDA_BLOCK_BYTES if device is not None and device.type == "cuda" else BLOCK_BYTES
    step = max(1, size // (columns * itemsize))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp32 whatever comes in, fp64 if fp64 comes in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def softmax_pass_(z: Tensor, targets: Tensor, *, entropy: bool, sum_sq: bool, spread: Tensor | None = None) -> RowStats:
    """Statistics of transformed logits `z [n, V]`, which are overwritten by `p - onehot`.

    The softmax is taken in place (each row is reduced before it is written, on CPU and CUDA alike). What follows is
    computed from it so that no digit of a small number passes through a large one:

    - 1 - p_y is the mass off the target, summed without it, never 1 minus something. logp is -log1p of its odds where
      p_y > 1/2. Elsewhere it is (z_y - max) - log_sum, that pair kept apart; log_sum is -log of the largest p.
    - The library's softmax adds up V numbers in few accumulators; `total` is the pairwise sum of what came out, and
      dividing by it takes that error back.

    `spread [n, V]`, where given, receives -dH/dz = p (log p + H), the entropy's own direction.
    """
    column = targets.unsqueeze(1)
    below_max = z.gather(1, column)
    below_max -= z.amax(1, keepdim=True)
    torch.softmax(z, 1, out=z)
    log_sum = -z.amax(1, keepdim=True).log_()
    norm = torch.linalg.vector_norm(z, dim=1) if sum_sq else None
    plogp = None
    if entropy:
        # xlogy and entr say the same and take three times as long on CPU. 0 * log(tiny) = 0: forbidden adds nothing.
        buffer = torch.empty_like(z) if spread is None else spread
        plogp = torch.clamp(z, min=torch.finfo(z.dtype).tiny, out=buffer).log_().mul_(z)
    p_target = z.gather(1, column)
    off_target = z.scatter_(1, column, 0.0).sum(1, keepdim=True)
    total = p_target + off_target
    logprobs = torch.where(
        p_target > 0.5, -(off_target / p_target).log1p_(), below_max - log_sum - total.log()
    ).squeeze(1)
    z.scatter_(1, column, -off_target / total)
    h = None
    if plogp is not None:
        h = total.log().squeeze(1) - plogp.sum(1).div_(total.squeeze(1))
        if spread is not None:
            _add_scaled_probs_(spread, z, column, p_target, h)
    lssp = None if norm is None else 2.0 * (norm.log() - total.log().squeeze(1))
    return RowStats(logprobs, h, lssp)


def _add_scaled_probs_(spread: Tensor, z: Tensor, column: Tensor, p_target: Tensor, h: Tensor) -> None:
    """spread += H p, from z = p - onehot: all entries but the target's are p already."""
    at_target = spread.gather(1, column).addcmul_(p_target, h.unsqueeze(1))
    spread.addcmul_(z, h.unsqueeze(1))
    spread.scatter_(1, column, at_target)


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
        """Slices of equal size, of all valid rows or of those from `start` to `stop`: the last GEMM is no sliver."""
        stop = self.count if stop is None else stop
        if start >= stop:
            return
        pieces = -(-(stop - start) // max(1, size))
        step = -(-(stop - start) // pieces)
        yield from (slice(at, min(at + step, stop)) for at in range(start, stop, step))

    def first(self, chosen: Tensor) -> tuple[Rows, int]:
        """The same rows in another order, the `chosen` (bool, of the valid rows) first, and how many these are."""
        index = torch.arange(self.total, device=chosen.device) if self.index is None else self.index
        reordered = Rows(self.shape, None)
        reordered.index, reordered.count = index[chosen.logical_not().argsort(stable=True)], self.count
        return reordered, int(chosen.sum())

    def take(self, source: Tensor, piece: slice) -> Tensor:
        """Rows `piece` of the valid rows of source `[..., K]`."""
        flat = _flat_view(source)
        if flat is not None:
            return flat[piece] if self.index is None else flat.index_select(0, self.index[piece])
        return source[torch.unravel_index(self._at(piece, source), self.shape)]

    def _at(self, piece: slice, like: Tensor) -> Tensor:
        if self.index is None:
            return torch.arange(piece.start, piece.stop, device=like.device)
        return self.index[piece]

    def put(self, into: Tensor, piece: slice, values: Tensor) -> None:
        """Write rows `piece` of the valid rows of `into [..., K]`, cast to its dtype."""
        values = values.to(into.dtype)
        flat = _flat_view(into)
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

    def coefficients(self, grad: Tensor | None, impossible: Tensor | None = None) -> Tensor | None:
        """The loss's derivative per valid token, as a column; 0 for the tokens (valid rows) that are `impossible`."""
        if grad is None:
            return None
        column = self.pick(grad)
        if impossible is not None:
            column = column.masked_fill(impossible, 0.0)
        return column.unsqueeze(1)

    def spread(self, values: Tensor) -> Tensor:
        """The other way: `[valid, ...]` back to all tokens, still flat, zeros where the mask is 0."""
        if self.index is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.index, values)

    def shaped(self, flat: Tensor | None) -> Any:
        """The tokens' shape again. For use outside of autograd Functions: a view returned by one refuses `x.mul_()`."""
        return None if flat is None else flat.view(self.shape)


def _flat_view(source: Tensor) -> Tensor | None:
    try:
        return source.view(-1, source.shape[-1]) if source.numel() else source.reshape(-1, source.shape[-1])
    except RuntimeError:
        return None
