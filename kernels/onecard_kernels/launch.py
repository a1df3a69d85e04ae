"""Whether Triton kernels can run on a device, and a context that records their launches instead of running them.

Recorded launches are compiled ahead of time for GPUs that are not present: a launching function is called with tensors
on the `meta` device at real sizes, and each record has the dtypes, block sizes and warps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: `args` are run-time arguments in order, `constexprs` compile-time arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches in the list that is yielded, instead of running them."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(
        kernel: Any,
        *args: Any,
        grid: tuple[int, ...],
        warmup: bool,
        num_warps: int = 4,
        num_stages: int = 2,
        **rest: Any,
    ) -> None:
        launches.append(Launch(kernel, grid, args, rest, num_warps, num_stages))

    before = JITFunction.run, InterpretedFunction.run
    JITFunction.run = InterpretedFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run, InterpretedFunction.run = before


def constant_in_graphs(function: F) -> F:
    """Let torch.compile call `function` and keep its result as a constant of the graph.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler, which takes one to three seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
def _triton() -> Any:
    """The triton module, or None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1 before triton was imported)."""
    return _triton() is not None and bool(_triton().knobs.runtime.interpret)


@constant_in_graphs  # torch.compile cannot trace the import of triton
def unavailable_reason(device: torch.device) -> str | None:
    """The reason why kernels cannot run on tensors of this device, or None."""
    if _triton() is None:
        return "triton is not installed"
    if device.type in ("cuda", "meta") or interpreted():
        return None
    return f"the tensors are on {device}: a GPU is needed (to test, set TRITON_INTERPRET=1 before triton is imported)"
