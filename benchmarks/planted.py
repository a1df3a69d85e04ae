"""Triton kernels with a fault each, which NVIDIA's checkers are to find before their silence counts."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def past_the_end(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """The last lane reads one element more than x has."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at + 1))


@triton.jit
def race(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All warps write different numbers into one word of shared memory, and read it, with no barrier."""
    at = tl.arange(0, BLOCK)
    read = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 cell; st.volatile.shared.b32 [cell], $1; ld.volatile.shared.b32 $0, [cell]; }",
        "=r,r",
        [tl.load(x_ptr + at)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(y_ptr + at, read)


FAULTS: dict[str, Any] = {"memcheck": past_the_end, "racecheck": race}
