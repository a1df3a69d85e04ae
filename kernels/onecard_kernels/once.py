"""Derivatives that there are none of, and that say so: gradients of gradients, and forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

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


def no_forward_ad(function: str, *operators: Any) -> None:
    """Of the `torch.library.custom_op`s of a function: tangents among their inputs are an error.

    torch would drop them, and a derivative would be 0 without a word, also where the operator is in a compiled graph.
    """
    for operator in operators:
        library, name, overload = operator._lib, operator._name, operator._opoverload
        guarded = _guard(function, overload, make_autograd_impl(overload, operator))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that one is overridden
            library.impl(name, guarded, "Autograd", with_keyset=True)


def _guard(function: str, overload: Any, autograd: Callable[..., Any]) -> Callable[..., Any]:
    names = [argument.name for argument in overload._schema.arguments]

    def guarded(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        level = forward_ad._current_level
        for argument, x in zip(names, args, strict=False) if level >= 0 else ():
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x, level=level).tangent is not None:
                raise NotImplementedError(
                    f"{function} does not support forward-mode AD, and {argument} has a tangent: differentiate with "
                    "backward or torch.autograd.grad"
                )
        return autograd(keyset, *args, **kwargs)

    return guarded


def _refuse(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch._C._functions.DelayedError(MESSAGE, 1)(x.detach().requires_grad_())
