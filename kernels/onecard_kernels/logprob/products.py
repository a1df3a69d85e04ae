"""The three products with the head, accumulated in fp32 (fp64 for fp64) whatever the inputs are.

Equal dtypes go to the BLAS as they are. bf16 or fp16 on CUDA uses a GEMM with an fp32 output. Everything else (low
precision on CPU, which has no such GEMM, and mixed dtypes) is upcast, the head in vocabulary tiles, never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 4096  # vocabulary rows upcast at a time: 16 MiB at D = 1024


def project(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[n, V] = h[n, D] @ weight[V, D].T"""
    if h.dtype == weight.dtype == out.dtype:
        torch.mm(h, weight.T, out=out)
    elif _has_fp32_output(h, weight):
        torch.mm(h, weight.T, out_dtype=torch.float32, out=out)
    else:
        h = h.to(out.dtype)
        for rows, tile in _tiles(weight, out.dtype):
            torch.mm(h, tile.T, out=out[:, rows])


def back(d: Tensor, weight: Tensor, like: torch.dtype) -> Tensor:
    """d[n, V] @ weight[V, D], `d` in the accumulation dtype; `like` is the dtype of the hidden states."""
    if weight.dtype == d.dtype:
        return torch.mm(d, weight)
    if d.is_cuda and weight.dtype == like and _low(like):
        return torch.mm(d.to(like), weight, out_dtype=torch.float32)
    total = d.new_zeros(d.shape[0], weight.shape[1])
    for rows, tile in _tiles(weight, d.dtype):
        total.addmm_(d[:, rows], tile)
    return total


def accumulate(total: Tensor, d: Tensor, h: Tensor) -> None:
    """total[V, D] += d[n, V].T @ h[n, D]"""
    if d.is_cuda and _low(h.dtype) and d.dtype == torch.float32:
        torch.addmm(total, d.to(h.dtype).T, h, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(d.T, h.to(d.dtype))


def _low(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _has_fp32_output(h: Tensor, weight: Tensor) -> bool:
    return h.is_cuda and h.dtype == weight.dtype and _low(h.dtype)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    buffer = weight.new_empty(min(TILE, weight.shape[0]), weight.shape[1], dtype=dtype)
    for start in range(0, weight.shape[0], TILE):
        rows = slice(start, min(start + TILE, weight.shape[0]))
        yield rows, buffer[: rows.stop - start].copy_(weight[rows])
