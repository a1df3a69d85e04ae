"""Gradients that were formed in the forward have no derivative of their own, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

MESSAGE = "this gradient was formed in the forward and has no derivative: create_graph=True cannot go through it"


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of a backward: its results refuse to be differentiated, where autograd would take them for constants.

    torch's `once_differentiable` looks at the incoming gradients alone, and these are constants in the usual case.
    """

    @wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        out = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return out
        return tuple(map(_refuse, out)) if isinstance(out, tuple) else _refuse(out)

    return refusing


def _refuse(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch._C._functions.DelayedError(MESSAGE, 1)(x.detach().requires_grad_())
