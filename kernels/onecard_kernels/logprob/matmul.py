"""The three matrix products with (a part of) the head, accumulated in fp32 (fp64 for fp64) whatever the inputs are.

fp32 and fp64 go to the BLAS as they are. bf16 or fp16 on CUDA uses a GEMM with an fp32 output. Everything else (low
precision on CPU, which has no such GEMM, and mixed dtypes) is upcast. The head is upcast a few thousand rows at a time,
into `scratch`, never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SCRATCH_ROWS = 4096  # rows of the head that are upcast at a time: 16 MiB at D = 1024


def autocast_is_on(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`. torch raises if it is asked about `meta`."""
    return not like.is_meta and torch.is_autocast_enabled(like.device.type)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def under_autocast(*factors: Tensor) -> tuple[Tensor, ...]:
    """Cast hidden states and heads as autocast does for a linear layer; unchanged if one of them is fp64.

    Autograd sees the cast. So backward, which runs outside of autocast, finds the same operands.
    """
    if not autocast_is_on(factors[0]) or any(x.dtype == torch.float64 for x in factors):
        return factors
    dtype = torch.get_autocast_dtype(factors[0].device.type)
    return tuple(x.to(dtype) for x in factors)


def operand_dtype(
    hidden: torch.dtype, weight: torch.dtype, accumulated: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype of both factors: 16 bits where the device multiplies them into fp32, else `accumulated`."""
    low = hidden in (torch.bfloat16, torch.float16)
    return hidden if device.type == "cuda" and hidden == weight and low else accumulated


def scratch_for(weight: Tensor, dtype: torch.dtype, columns: int) -> Tensor | None:
    """Memory for upcast rows of the head; None if it has the operands' dtype."""
    return None if weight.dtype == dtype else weight.new_empty(min(SCRATCH_ROWS, columns), weight.shape[1], dtype=dtype)


def project(h: Tensor, weight: Tensor, out: Tensor, scratch: Tensor | None) -> None:
    """out[n, c] = h[n, D] @ weight[c, D].T"""
    for rows, part in _parts(weight, scratch):
        into = out if scratch is None else out[:, rows]
        if h.dtype == out.dtype:
            torch.mm(h, part.T, out=into)
        else:
            torch.mm(h, part.T, out_dtype=out.dtype, out=into)


def project_back(d: Tensor, weight: Tensor, total: Tensor | None, dtype: torch.dtype, scratch: Tensor | None) -> Tensor:
    """d[n, c] @ weight[c, D], added to `total` where there is one, in `dtype`."""
    for rows, part in _parts(weight, scratch):
        columns = d if scratch is None else d[:, rows]
        if d.dtype == dtype:
            total = torch.mm(columns, part) if total is None else total.addmm_(columns, part)
        elif total is None:
            total = torch.mm(columns, part, out_dtype=dtype)
        else:
            total = torch.addmm(total, columns, part, out_dtype=dtype, out=total)
    assert total is not None
    return total


def outer(d: Tensor, h: Tensor, total: Tensor) -> None:
    """total[c, D] += d[n, c].T @ h[n, D]"""
    if d.dtype == total.dtype:
        total.addmm_(d.T, h)
    else:
        torch.addmm(total, d.T, h, out_dtype=total.dtype, out=total)


def _parts(weight: Tensor, scratch: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    if scratch is None:
        yield slice(0, weight.shape[0]), weight
        return
    for start in range(0, weight.shape[0], scratch.shape[0]):
        rows = slice(start, min(start + scratch.shape[0], weight.shape[0]))
        yield rows, scratch[: rows.stop - start].copy_(weight[rows])
