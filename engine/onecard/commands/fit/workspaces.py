"""Memory that operators of PyTorch and bitsandbytes allocate while they run; `onecard_kernels.workspace` has ours.

The formulas follow the sources of PyTorch's flash attention (FlashAttention 2) and of bitsandbytes. They leave out a
few bytes per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onecard.commands.fit.tracker import Workspace
from onecard_kernels import workspace

FLASH_ROWS = 128  # queries in a block; the length of each sequence is rounded up to whole blocks
FUSED_ROWS = 4  # for at most this many rows of activations, bitsandbytes multiplies without unpacking the weights


def rounded_width(width: int) -> int:
    """The padded head width in flash attention's accumulators."""
    return -(-width // 32) * 32 if width <= 192 else 256


def flash_backward(rows: int, key_rows: int, heads: int, key_heads: int, width: int, itemsize: int) -> int:
    """Bytes of dq in fp32, of each row's sum of out * d_out, and of dk, dv per query head where heads share keys."""
    expanded = 2 * key_rows * heads * width * itemsize if heads != key_heads else 0
    return rows * heads * (rounded_width(width) + 1) * 4 + expanded


def varlen_backward(target: torch.device, d_out: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> int:
    """Backward of varlen attention: query [n, H, d], key [m, G, d]."""
    cu_queries = next(arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.int32)
    rows = query.shape[0] + FLASH_ROWS * (cu_queries.numel() - 1)
    heads, width = query.shape[1:]
    return flash_backward(rows, key.shape[0], heads, key.shape[1], width, query.element_size())


def dense_backward(target: torch.device, d_out: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> int:
    """Backward of flash attention in `scaled_dot_product_attention`: query [b, H, n, d], key [b, G, m, d]."""
    batch, heads, rows, width = query.shape
    rows = batch * -(-rows // FLASH_ROWS) * FLASH_ROWS
    return flash_backward(rows, batch * key.shape[2], heads, key.shape[1], width, query.element_size())


def nf4_statistics(blocks: int) -> int:
    """Bytes of NF4's block statistics in fp32, before and after their mean is added."""
    return 2 * blocks * 4


def gemm_4bit(
    target: torch.device, a: Tensor, b: Tensor, shape: Any, absmax: Tensor, blocksize: int, *args: Any, **kwargs: Any
) -> int:
    """bitsandbytes' product with a 4-bit weight: fused for up to `FUSED_ROWS` rows on a GPU, else unpacked first."""
    size = math.prod(shape)
    if target.type == "cuda" and a.numel() // a.shape[-1] <= FUSED_ROWS:
        return 0
    return size * a.element_size() + nf4_statistics(-(-size // blocksize))


def multinomial(target: torch.device, probabilities: Tensor, *args: Any, **kwargs: Any) -> int:
    """`torch.multinomial`: one random number for each probability."""
    return probabilities.numel() * probabilities.element_size()


WORKSPACES: dict[str, Workspace] = {
    "torch_attn::_varlen_attn_backward": varlen_backward,
    "aten::_scaled_dot_product_flash_attention_backward": dense_backward,
    "bitsandbytes::gemm_4bit": gemm_4bit,
    "aten::multinomial": multinomial,
}


def workspaces() -> dict[str, Workspace]:
    """Operator -> its workspace, for the operators of PyTorch, bitsandbytes and `onecard_kernels`."""

    def kernel_workspace(name: str) -> Workspace:
        return lambda target, *args, **kwargs: workspace.workspace_bytes(name, target, *args, **kwargs)

    return {**{name: kernel_workspace(name) for name in workspace.TABLE}, **WORKSPACES}
