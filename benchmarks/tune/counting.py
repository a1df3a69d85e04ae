"""How many launches a call of the linear path makes on a GPU, counted without one: on tensors that have no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import Shape
from benchmarks.tune.turning import library

PRODUCTS = ("mm", "addmm", "addmm_")


@dataclass(frozen=True)
class Launches:
    products: int
    kernels: int  # of Triton
    small: int  # operations on a chunk's tokens, a launch each

    @property
    def total(self) -> int:
        return self.products + self.kernels + self.small


class Counted(TorchDispatchMode):
    """Operators that start something: views and fresh memory do not."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.small = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name in PRODUCTS:
            self.products += 1
        elif not view and "empty" not in name:
            self.small += 1
        return func(*args, **(kwargs or {}))


def frozen(shape: Shape, implementation: str) -> Launches:
    """Of linear_logprobs with a frozen head, forward, by the plan of a GPU. In fp32: bf16 has a cast or two more."""
    plans, raw = library("logprob.tuning"), library("logprob.linear")

    def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    hidden, weight = meta(shape["N"], shape["D"]), meta(shape["V"], shape["D"])
    y = meta(shape["N"], dtype=torch.int64)
    with (
        plans.override(implementation=implementation),
        library("launch").recording() as kernels,
        Counted() as counted,
    ):
        # the operator's body: called as an operator it would be one step
        raw._forward._init_fn(
            *(hidden, weight, y, None, None, None, 1.0, 1.0, None), False, False, False, raw.FROZEN, "triton"
        )
    return Launches(counted.products, len(kernels), counted.small)
