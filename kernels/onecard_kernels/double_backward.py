"""Guards against derivatives that an operator does not have: double backward and forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

MESSAGE = "this gradient was computed in the forward and is not differentiable: call backward without create_graph=True"


def no_double_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Raise on double backward: the gradient is computed in the forward and is not differentiable.

    torch's `once_differentiable` looks only at the incoming gradients, which are usually constants: the second backward
    would treat the result as a constant, without an error.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        out = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return out
        return tuple(map(_not_differentiable, out)) if isinstance(out, tuple) else _not_differentiable(out)

    return guarded


def no_forward_ad(function: str, *operators: Any) -> None:
    """Make the `torch.library.custom_op`s of `function` raise if an input has a tangent.

    torch would drop the tangent and return a derivative of 0, also in a compiled graph.
    """
    for operator in operators:
        library, name, overload = operator._lib, operator._name, operator._opoverload
        guarded = _guard(function, overload, make_autograd_impl(overload, operator))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")  # the override is intended
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


def _not_differentiable(x: Any) -> Any:
    """Make a tensor raise when it is differentiated."""
    if not isinstance(x, Tensor):
        return x
    return torch._C._functions.DelayedError(MESSAGE, 1)(x.detach().requires_grad_())
