"""What operators of others hold inside while they run, as `onecard_kernels.workspace` says it of our own.

From the sources of PyTorch's flash attention (FlashAttention 2) and of bitsandbytes; what is left out is a few bytes
per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onecard.commands.fit.tracker import Workspace
from onecard_kernels import workspace

FLASH_ROWS = 128  # queries of a block; sequences are counted as if each ended a block
FUSED_ROWS = 4  # of activations, up to which bitsandbytes multiplies by packed weights on every GPU


def rounded_width(width: int) -> int:
    """Of a head, in flash attention's sums."""
    return -(-width // 32) * 32 if width <= 192 else 256


def flash_backward(rows: int, key_rows: int, heads: int, key_heads: int, width: int, itemsize: int) -> int:
    """dq in fp32, the rows' sums of out * d_out, and dk, dv of every query head where heads share keys."""
    expanded = 2 * key_rows * heads * width * itemsize if heads != key_heads else 0
    return rows * heads * (rounded_width(width) + 1) * 4 + expanded


def varlen_backward(target: torch.device, d_out: Tensor, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> int:
    cu_queries = next(each for each in rest if isinstance(each, Tensor) and each.dtype == torch.int32)
    rows = query.shape[0] + FLASH_ROWS * (cu_queries.numel() - 1)
    heads, width = query.shape[1:]
    return flash_backward(rows, key.shape[0], heads, key.shape[1], width, query.element_size())


def dense_backward(target: torch.device, d_out: Tensor, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> int:
    batch, heads, rows, width = query.shape
    rows = batch * -(-rows // FLASH_ROWS) * FLASH_ROWS
    return flash_backward(rows, batch * key.shape[2], heads, key.shape[1], width, query.element_size())


def nf4_statistics(blocks: int) -> int:
    """The block statistics of NF4 in fp32, before and after their mean is added."""
    return 2 * blocks * 4


def gemm_4bit(
    target: torch.device, a: Tensor, b: Tensor, shape: Any, absmax: Tensor, blocksize: int, *rest: Any, **more: Any
) -> int:
    """Few rows are multiplied by the packed weight; for more of them it is unpacked first."""
    size = math.prod(shape)
    if target.type == "cuda" and a.numel() // a.shape[-1] <= FUSED_ROWS:
        return 0
    return size * a.element_size() + nf4_statistics(-(-size // blocksize))


def draws(target: torch.device, probabilities: Tensor, *rest: Any, **more: Any) -> int:
    """A random number for each probability."""
    return probabilities.numel() * probabilities.element_size()


TABLE: dict[str, Workspace] = {
    "torch_attn::_varlen_attn_backward": varlen_backward,
    "aten::_scaled_dot_product_flash_attention_backward": dense_backward,
    "bitsandbytes::gemm_4bit": gemm_4bit,
    "aten::multinomial": draws,
}


def workspaces() -> dict[str, Workspace]:
    """All that are known, ours among them."""

    def ours(name: str) -> Workspace:
        return lambda target, *given, **more: workspace.workspace_bytes(name, target, *given, **more)

    return {**{name: ours(name) for name in workspace.TABLE}, **TABLE}
