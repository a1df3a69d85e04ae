"""Temporary memory of the registered operators, beyond their inputs and outputs: for memory plans.

A tensor tracker sees the inputs and outputs of an operator, but not what the operator allocates and frees inside. So
each operator that allocates more than a few numbers per token registers a formula, which computes the bytes from
shapes, dtypes and the tile sizes of a device. The tensors may be on `meta`, and nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

Formula = Callable[[torch.device, SimpleNamespace], int]
F = TypeVar("F", bound=Formula)

TABLE: dict[str, Formula] = {}


def formula(operator: str) -> Callable[[F], F]:
    """Register the decorated function as the formula of `operator`. It gets the device, and the arguments by name."""

    def register(function: F) -> F:
        TABLE[operator] = function
        return function

    return register


def workspace_bytes(operator: str, device: torch.device, *arguments: Any, **more: Any) -> int:
    """Largest temporary memory of `operator` ("onecard::linear_logprobs", ...) on `device`, in bytes.

    `arguments` are the operator's own. The result is 0 for an operator without a formula.
    """
    compute = TABLE.get(operator)
    if compute is None:
        return 0
    schema = getattr(torch.ops.onecard, operator.removeprefix("onecard::")).default._schema
    by_name = {argument.name: argument.default_value for argument in schema.arguments}
    by_name.update(zip(by_name, arguments, strict=False))
    return compute(device, SimpleNamespace(**{**by_name, **more}))
