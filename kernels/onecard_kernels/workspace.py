"""Bytes that the registered operators hold inside, beyond their inputs and outputs, while they run: for memory plans.

A tracker of tensors sees the inputs and outputs of an operator, never what it allocates and frees in between. So each
operator that needs more than a few numbers per token has a formula beside it: arithmetic on shapes, dtypes and the tile
sizes for the device that is asked about. The tensors may be on `meta`, and nothing runs.
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
    """Register the decorated function as the formula of `operator`: it gets the device, and the arguments by name."""

    def register(function: F) -> F:
        TABLE[operator] = function
        return function

    return register


def workspace_bytes(operator: str, device: torch.device, *arguments: Any, **more: Any) -> int:
    """Bytes that `operator` ("onecard::linear_logprobs", ...) holds at most beyond inputs and outputs on `device`.

    `arguments` are the operator's own. An operator that holds no more than a few numbers per token gives 0.
    """
    found = TABLE.get(operator)
    if found is None:
        return 0
    schema = getattr(torch.ops.onecard, operator.removeprefix("onecard::")).default._schema
    named = {argument.name: argument.default_value for argument in schema.arguments}
    named.update(zip(named, arguments, strict=False))
    return found(device, SimpleNamespace(**{**named, **more}))
