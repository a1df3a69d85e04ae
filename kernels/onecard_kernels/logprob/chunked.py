"""linear_logprobs in torch: token chunks, the frozen head in two GEMMs.

Logits of one chunk at a time. With a frozen head the forward overwrites them by `p - onehot`, multiplies back by the
head and keeps the direction dlogp/dh [valid tokens, D]; the backward of any loss is then a row scaling. A trained head
(weight or bias) recomputes each chunk in the backward, because its gradient needs the loss's coefficients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..records import Head, LogProbs
from . import products
from .passes import Rows, blocks, result_dtype, softmax_pass_

# On CPU a smaller chunk keeps the passes nearer to the caches and holds less; a larger one reads the whole head less
# often. Measured against eager and the other libraries in benchmarks/results/.
CPU_CHUNK_BYTES = 48 << 20
CUDA_CHUNK_BYTES = 512 << 20
CUDA_CHUNK_ROWS = 1024  # at 256 rows the second GEMM fills a quarter of a large chip
MIN_CHUNK_ROWS = 64  # below this a GEMM is bound by reading the head


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    head: Head,
    mask: Tensor | None,
    return_entropy: bool,
    entropy_requires_grad: bool,
    return_log_sum_sq_probs: bool,
) -> LogProbs:
    grad = torch.is_grad_enabled()
    trained = grad and (weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
    rows = Rows(targets.shape, mask)
    y = rows.pick(targets).long()
    wants = _Wants(
        entropy=return_entropy or entropy_requires_grad,
        sum_sq=return_log_sum_sq_probs,
        direction=grad and hidden.requires_grad and not trained,
        entropy_grad=grad and entropy_requires_grad,
    )
    function = _Recomputed if trained else _Directions
    return LogProbs(*map(rows.shaped, function.apply(hidden, weight, head.bias, y, head, rows, wants)))


class _Wants:
    """What the forward is asked to produce."""

    def __init__(self, *, entropy: bool, sum_sq: bool, direction: bool, entropy_grad: bool) -> None:
        self.entropy = entropy
        self.sum_sq = sum_sq
        self.direction = direction
        self.entropy_grad = entropy_grad


class _Chunk:
    """Workspace for one chunk of logits: `z`, with a softcap its `slope`, and for the entropy's gradient `spread`."""

    def __init__(self, rows: Rows, hidden: Tensor, weight: Tensor, head: Head, *, slope: bool, spread: bool) -> None:
        self.dtype = result_dtype(hidden.dtype, weight.dtype)
        self.weight, self.head, self.hidden, self.rows = weight, head, hidden, rows
        size = chunk_rows(weight.shape[0], self.dtype, hidden.device)
        self.pieces = list(rows.chunks(size))
        shape = (self.pieces[0].stop if self.pieces else 0, weight.shape[0])
        self.z = hidden.new_empty(shape, dtype=self.dtype)
        self.slope = torch.empty_like(self.z) if slope and head.softcap is not None else None
        self.spread = torch.empty_like(self.z) if spread else None

    def softmax(self, piece: slice, y: Tensor, out: tuple[Tensor, Tensor | None, Tensor | None]) -> Tensor:
        """Fill `z` with p - onehot (and `spread` with -dH/dz) for one piece, its statistics into `out`."""
        n = piece.stop - piece.start
        h = self.rows.take(self.hidden, piece)
        products.project(h, self.weight, self.z[:n])
        for block in blocks(n, self.z.shape[1], self.z.element_size()):
            z = self.z[:n][block]
            self.head.transform_(z, None if self.slope is None else self.slope[:n][block])
            here = slice(piece.start + block.start, piece.start + block.stop)
            spread = None if self.spread is None else self.spread[:n][block]
            stats = softmax_pass_(z, y[here], entropy=out[1] is not None, sum_sq=out[2] is not None, spread=spread)
            for into, value in zip(out, stats, strict=True):
                if into is not None and value is not None:
                    into[here] = value
        return h

    def through_softcap_(self, d: Tensor) -> Tensor:
        return d if self.slope is None else d.mul_(self.slope[: d.shape[0]])

    def back(self, d: Tensor) -> Tensor:
        """-(d @ weight) times the constant part of the transform's derivative; `d` is `p - onehot` or `-dH/dz`."""
        return products.back(self.through_softcap_(d), self.weight, self.hidden.dtype).mul_(-self.head.factor)


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    row = vocabulary * dtype.itemsize
    if device.type == "cpu":
        return max(MIN_CHUNK_ROWS, CPU_CHUNK_BYTES // row)
    return min(CUDA_CHUNK_ROWS, max(4 * MIN_CHUNK_ROWS, CUDA_CHUNK_BYTES // row))


def _outputs(chunk: _Chunk, rows: Rows, wants: _Wants) -> tuple[Tensor, Tensor | None, Tensor | None]:
    def new() -> Tensor:
        return chunk.z.new_empty(rows.count)

    return new(), new() if wants.entropy else None, new() if wants.sum_sq else None


def _spread(
    ctx: Any, out: tuple[Tensor, Tensor | None, Tensor | None], rows: Rows, wants: _Wants
) -> tuple[Tensor | None, ...]:
    result = tuple(None if x is None else rows.spread(x) for x in out)
    detached = (result[2],) if wants.entropy_grad else (result[1], result[2])
    ctx.mark_non_differentiable(*(x for x in detached if x is not None))
    ctx.set_materialize_grads(False)
    return result


class _Directions(torch.autograd.Function):
    """Frozen head. Forward: one GEMM, and one more for each direction kept. Backward: no GEMM."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, head: Head, rows: Rows, wants: _Wants
    ) -> tuple[Tensor | None, ...]:
        kept = [hidden.new_empty(rows.count, hidden.shape[-1]) if want else None for want in _kept(wants)]
        with torch.autocast(hidden.device.type, enabled=False):
            spread = wants.direction and wants.entropy_grad
            chunk = _Chunk(rows, hidden, weight, head, slope=wants.direction, spread=spread)
            out = _outputs(chunk, rows, wants)
            for piece in chunk.pieces:
                chunk.softmax(piece, y, out)
                for direction, source in zip(kept, (chunk.z, chunk.spread), strict=True):
                    if direction is not None and source is not None:
                        direction[piece] = chunk.back(source[: piece.stop - piece.start])
        if wants.direction:
            ctx.save_for_backward(out[0] == float("-inf"), *kept)
            ctx.rows, ctx.shape = rows, hidden.shape
        return _spread(ctx, out, rows, wants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        impossible, direction, entropy_direction = ctx.saved_tensors
        rows: Rows = ctx.rows
        coefficients = rows.coefficients(grads[0], impossible), rows.coefficients(grads[1])
        grad = None
        for column, kept in zip(coefficients, (direction, entropy_direction), strict=True):
            if column is not None and kept is not None:
                grad = kept * column if grad is None else grad.addcmul_(kept, column)
        if grad is not None:
            grad = rows.spread(grad.to(direction.dtype)).view(ctx.shape)
        return grad, *(None,) * 6


def _kept(wants: _Wants) -> tuple[bool, bool]:
    return wants.direction, wants.direction and wants.entropy_grad


class _Recomputed(torch.autograd.Function):
    """Trained weight or bias. Forward: one GEMM. Backward: the logits again, then one GEMM for each gradient asked."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, head: Head, rows: Rows, wants: _Wants
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            chunk = _Chunk(rows, hidden, weight, head, slope=False, spread=False)
            out = _outputs(chunk, rows, wants)
            for piece in chunk.pieces:
                chunk.softmax(piece, y, out)
        ctx.save_for_backward(hidden, weight, bias, y, head.forbidden, out[0] == float("-inf"))
        ctx.head, ctx.rows, ctx.wants = head, rows, wants
        return _spread(ctx, out, rows, wants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, y, forbidden, impossible = ctx.saved_tensors
        rows: Rows = ctx.rows
        head = replace(ctx.head, bias=bias, forbidden=forbidden)
        on_logp = rows.coefficients(grads[0], impossible)
        on_entropy = rows.coefficients(grads[1]) if ctx.wants.entropy_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            chunk = _Chunk(rows, hidden, weight, head, slope=True, spread=on_entropy is not None)
            scratch = chunk.z.new_empty(rows.count)
            out = scratch, scratch if on_entropy is not None else None, None
            total = _Gradients(ctx.needs_input_grad, hidden, weight, bias, rows, chunk.dtype)
            for piece in chunk.pieces:
                h = chunk.softmax(piece, y, out)
                n = piece.stop - piece.start
                d = chunk.z[:n]
                d.mul_(on_logp[piece]) if on_logp is not None else d.zero_()
                if on_entropy is not None and chunk.spread is not None:
                    d.addcmul_(chunk.spread[:n], on_entropy[piece])
                total.add(piece, chunk.through_softcap_(d).mul_(-head.factor), h)
        return *total.result(hidden, weight, bias), None, None, None, None


class _Gradients:
    """The sums of a recomputing backward; only those that are needed exist."""

    def __init__(
        self,
        needed: tuple[bool, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        dtype: torch.dtype,
    ) -> None:
        self.weight_used, self.rows = weight, rows
        self.hidden = hidden.new_empty(rows.count, hidden.shape[-1]) if needed[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=dtype) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needed[2] and bias is not None else None

    def add(self, piece: slice, d: Tensor, h: Tensor) -> None:
        """d: the loss's derivative by `h @ W.T + bias` times logit_scale's share; see Head.factor."""
        if self.hidden is not None:
            self.hidden[piece] = products.back(d, self.weight_used, self.hidden.dtype)
        if self.weight is not None:
            products.accumulate(self.weight, d, h)
        if self.bias is not None:
            self.bias += d.sum(0)

    def result(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        return (
            None if self.hidden is None else self.rows.spread(self.hidden).view(hidden.shape),
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )
