"""Checks of arguments: errors that name the argument, its value and what was expected, before any work is done.

Shapes, dtypes, devices and Python numbers are always checked. *Values* inside tensors are checked on CPU, and on other
devices only with ONECARD_CHECK=1, because reading them would wait for the device. They are not checked under
torch.compile or in transforms of torch.func, where tensors have no values. The operators check token ids (`ids`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .records import Head

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tensor classes whose elements are in their own memory. The last two represent such a tensor while it is traced.
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def values_are_checked(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return device.type == "cpu" or os.environ.get("ONECARD_CHECK") == "1"


def reverse_mode_only(function: str, **given: object) -> None:
    """Raise under torch.func and forward-mode AD: the operators that compute the gradients have only a backward."""
    if torch.compiler.is_compiling():  # the operators check it there (`no_forward_ad`)
        return
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{function} does not support torch.func (grad, vmap, jvp: forward-mode AD): differentiate with backward "
            "or torch.autograd.grad, and give a batch as leading dimensions"
        )
    name = _with_tangent(given)
    if name is not None:
        raise NotImplementedError(
            f"{function} does not support forward-mode AD, and {name} has a tangent: differentiate with backward or "
            "torch.autograd.grad"
        )


def constants(function: str, **given: object) -> None:
    """Raise if an input that the function detaches has a tangent, which would be lost without an error."""
    name = None if torch.compiler.is_compiling() else _with_tangent(given)
    if name is not None:
        raise NotImplementedError(
            f"{function} takes {name} as a constant, and {name} has a tangent of forward-mode AD: pass {name}.detach()"
        )


def _with_tangent(given: dict[str, object]) -> str | None:
    """The name of the first tensor that has a tangent of forward-mode AD, or None."""
    if forward_ad._current_level < 0:
        return None
    for name, value in given.items():
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            return name
    return None


def python_number(value: Any) -> Any:
    """Convert a NumPy scalar or a 0-d CPU tensor without a gradient to a Python number; anything else is unchanged."""
    if type(value) in (int, float) or getattr(value, "shape", None) != ():
        return value
    if isinstance(value, Tensor) and (value.requires_grad or not value.is_cpu):
        return value
    return value.item()


def tensor(name: str, value: object) -> None:
    if value is None:
        raise ValueError(f"{name} is None, expected a tensor")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor")
    kind = type(value)
    if hasattr(value, "full_tensor") and hasattr(value, "placements"):
        raise TypeError(f"{name} is a {kind.__name__}, expected a plain tensor: {_dtensor_advice(name)}")
    if kind not in PLAIN and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {kind.__name__}, expected a plain dense tensor: dequantize (or gather) it before the call"
        )
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        layout = "nested" if value.is_nested else "quantized" if value.is_quantized else f"of layout {value.layout}"
        raise TypeError(f"{name} is {layout}, expected a plain dense tensor")


def _dtensor_advice(name: str) -> str:
    """How to convert a DTensor such that its gradient is right: FSDP averages those of weights over ranks."""
    if name not in ("weight", "bias", "ref_weight", "ref_bias"):
        return f"pass {name}.to_local(), or {name}.full_tensor() where each rank computes the loss of the whole batch"
    return (
        f'pass {name}.full_tensor(grad_placements=[Partial("avg")] * {name}.device_mesh.ndim), with Partial of '
        "torch.distributed.tensor, which averages the gradient over the ranks as FSDP does; with full_tensor() alone "
        "each rank would keep its own gradient"
    )


def floating(name: str, value: Tensor) -> None:
    tensor(name, value)
    if value.dtype in FLOATS:
        return
    if type(value) not in PLAIN:
        raise TypeError(
            f"{name} is a {type(value).__name__} of {value.dtype} (quantized), expected a plain dense tensor: "
            "dequantize it before the call"
        )
    if value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, expected 16 bits or more: multiply it by its scale first")
    raise TypeError(f"{name} has dtype {value.dtype}, expected a floating point dtype")


def integer(name: str, value: Tensor) -> None:
    tensor(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {value.dtype}, expected an integer dtype")


def shape(name: str, value: Tensor, expected: Iterable[int], description: str) -> None:
    expected = tuple(expected)
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}, {description}")


def device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device} like {like_name}")


def positive(name: str, value: float) -> None:
    above(name, value, 0.0)


def within(name: str, value: float, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected a number from {low:g} to {high:g}")


def finite(name: str, value: float) -> None:
    if not _is_number(value) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a finite number")


def at_least(name: str, value: float, low: float) -> None:
    if not _is_number(value) or not low <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a finite number of {low:g} or more")


def above(name: str, value: float, low: float) -> None:
    if not _is_number(value) or not low < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a finite number above {low:g}")


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def no_nan(name: str, value: Tensor, valid: Tensor | None = None) -> None:
    """Raise if a value is NaN; with `valid`, only where it is 1."""
    # A sum is NaN if a value is NaN. It is NaN after inf - inf too, which is no error: then the values decide.
    if not values_are_checked(value.device) or not bool(value.detach().sum().isnan()):
        return
    nans = value.isnan() if valid is None else value.isnan() & valid.bool()
    if bool(nans.any()):
        where = "" if valid is None else " wherever mask is 1"
        raise ValueError(f"{name} has {int(nans.sum())} NaN among {value.numel()} values, expected none{where}")


def alike(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Check for a floating point tensor of `like`'s shape, on its device."""
    floating(name, value)
    shape(name, value, like.shape, f"the shape of {like_name}")
    device(name, value, like_name, like)


def normalizer(value: float | Tensor | None) -> float | Tensor | None:
    """Check the normalizer, and convert a NumPy number to a Python number."""
    if isinstance(value, Tensor):
        tensor("normalizer", value)
        shape("normalizer", value, (), "a number or a 0-d tensor")
        if values_are_checked(value.device):
            positive("normalizer", value.item())
        return value
    number: float | None = python_number(value)
    if number is not None:
        positive("normalizer", number)
    return number


def mask(value: Tensor | None, like_name: str, like: Tensor) -> None:
    if value is None:
        return
    tensor("mask", value)
    if value.dtype.is_complex:
        raise TypeError(f"mask has dtype {value.dtype}, expected bool, or numbers that are 0 or 1")
    shape("mask", value, like.shape, f"the shape of {like_name}")
    device("mask", value, like_name, like)
    if value.dtype != torch.bool and values_are_checked(value.device):
        odd = value[(value != 0) & (value != 1)]
        if odd.numel():
            raise ValueError(f"mask holds {odd[0].item()}, expected only 0 and 1")


def ids(y: Tensor, vocabulary: int, valid: Tensor | None = None) -> None:
    """Raise if a target is outside of [0, vocabulary); with `valid`, only where it is 1.

    An unmasked -100 is an error, not a token to skip: the caller divides by the number of unmasked tokens.
    The operators call this, so it is also checked under torch.compile. On CUDA it is a device-side assert, which does
    not synchronize.
    """
    checked = values_are_checked(y.device)
    if not checked and y.device.type != "cuda":
        return
    outside = (y < 0) | (y >= vocabulary)
    if valid is not None:
        outside &= valid.bool()
    if checked:
        if bool(outside.any()):
            raise ValueError(
                f"targets holds {y[outside][0].item()}, expected ids from 0 to {vocabulary - 1} wherever mask is 1"
            )
    else:
        torch._assert_async(~outside.any(), f"targets holds ids outside of 0 to {vocabulary - 1} where mask is 1")


def bias(name: str, value: Tensor | None, vocabulary: int, like: Tensor) -> None:
    if value is None:
        return
    floating(name, value)
    shape(name, value, (vocabulary,), f"one per row of weight ({vocabulary})")
    device(name, value, "hidden", like)
    if values_are_checked(like.device) and not bool(value.isfinite().all()):
        raise ValueError(f"{name} holds inf or NaN, expected finite values; forbid tokens with `forbidden`")


def make_head(
    bias: Tensor | None, temperature: float, logit_scale: float, softcap: float | None, forbidden: Tensor | None
) -> Head:
    """The head's record, with Python numbers."""
    return Head(bias, python_number(temperature), python_number(logit_scale), python_number(softcap), forbidden)


def head(value: Head, vocabulary: int, like: Tensor) -> None:
    positive("temperature", value.temperature)
    finite("logit_scale", value.logit_scale)
    if value.softcap is not None:
        positive("softcap", value.softcap)
    bias("bias", value.bias, vocabulary, like)
    if value.forbidden is not None:
        tensor("forbidden", value.forbidden)
        if value.forbidden.dtype != torch.bool:
            raise TypeError(f"forbidden has dtype {value.forbidden.dtype}, expected torch.bool")
        shape("forbidden", value.forbidden, (vocabulary,), f"one per row of weight ({vocabulary})")
        device("forbidden", value.forbidden, "hidden", like)
        if values_are_checked(like.device) and bool(value.forbidden.all()):
            raise ValueError(f"forbidden is True for all {vocabulary} tokens, expected at least one allowed token")


def logits(value: Tensor, targets_: Tensor, temperature: float, mask_: Tensor | None) -> None:
    """Check the arguments that all functions of logits have in common."""
    floating("logits", value)
    integer("targets", targets_)
    if value.dim() < 1 or value.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(value.shape)}, expected [..., V] with V above 0")
    shape("targets", targets_, value.shape[:-1], "logits' shape without its last dimension")
    device("targets", targets_, "logits", value)
    positive("temperature", temperature)
    mask(mask_, "targets", targets_)


def product(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    """Check that hidden states `[..., D]` and the head's weight `[V, D]` can be multiplied."""
    floating(hidden_name, hidden)
    floating(weight_name, weight)
    if hidden.dim() < 1:
        raise ValueError(f"{hidden_name} has shape (), expected [..., D]")
    if tuple(weight.shape) == (0,):
        raise ValueError(
            f"{weight_name} has shape (0,), expected [V, D]: ZeRO-3 has emptied it; gather it around the call and its "
            f"backward, with deepspeed.zero.GatheredParameters({weight_name})"
        )
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{weight_name} has shape {tuple(weight.shape)}, expected [V, D] with V above 0")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}, expected [V, {hidden.shape[-1]}] for {hidden_name} "
            f"{tuple(hidden.shape)}"
        )
    device(weight_name, weight, hidden_name, hidden)


def linear(hidden: Tensor, weight: Tensor, targets_: Tensor, head_: Head, mask_: Tensor | None) -> None:
    """Check the arguments that all functions from hidden states to log-probabilities have in common."""
    product("hidden", hidden, "weight", weight)
    integer("targets", targets_)
    shape("targets", targets_, hidden.shape[:-1], "hidden's shape without its last dimension")
    device("targets", targets_, "hidden", hidden)
    head(head_, weight.shape[0], hidden)
    mask(mask_, "targets", targets_)


def chunk_tokens(value: int | None) -> int | None:
    number: int | None = python_number(value)
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"chunk_tokens is {value!r}, expected a whole number of 1 or more, or None")
    return number


def not_emptied(weight: Tensor) -> None:
    """Raise if ZeRO-3 has emptied the weight between forward and backward."""
    if weight.dim() != 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} in the backward, expected [V, D] as in the forward: ZeRO-3 has "
            "emptied it; keep deepspeed.zero.GatheredParameters(weight) around the backward too"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
