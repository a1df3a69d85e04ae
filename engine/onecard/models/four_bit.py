"""NF4 weights: linear layers by transformers and bitsandbytes, and stacked experts, which both leave in 16 bit.

The experts of a mixture are one parameter [E, out, in]. It is packed as it is read, never held in 16 bit as a whole;
a pass unpacks the experts of one layer at a time, and its backward unpacks them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onecard.models.targets import is_linear, is_mamba_mixer, is_stack
from onecard.utils.errors import OnecardError

MOST_UNPACKED = 0.1  # of the weights of linear maps may stay in 16 bit
MOST_NUMBERS = 1 << 31  # that bitsandbytes' kernels count in one tensor


def nf4_settings(dtype: torch.dtype) -> Any:
    """transformers' quantization config: NF4 with double quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def stack_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters [E, out, in] of a module that holds stacked experts."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if is_stack(module) and len(shape_of(parameter)) == 3
    }


def shape_of(parameter: Tensor) -> torch.Size:
    """A weight's shape, whether it is packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def is_packed(parameter: Tensor) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def read_directly(model: nn.Module) -> list[str]:
    """The linear layers whose weights a model reads itself instead of calling them, so they cannot be packed.

    Gemma 3n clamps those of AltUp in training mode; Mamba multiplies with dt_proj's.
    """
    mixers = [path for path, module in model.named_modules() if is_mamba_mixer(module)]
    clamped = [path for path, _ in model.named_modules() if path.endswith(("prediction_coefs", "correction_coefs"))]
    return [f"{path}.dt_proj" for path in mixers] + clamped


@contextmanager
def packing_experts(wanted: bool = True) -> Iterator[list[str]]:
    """Inside, transformers packs stacked experts too when it loads a model in 4 bit. Yields what is wrong with any."""
    if not wanted:
        yield []
        return
    from bitsandbytes.nn import Params4bit
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    faults: list[str] = []

    class Pack(Bnb4bitQuantize):
        def convert(self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **more: Any) -> Any:
            [(name, value)] = input_dict.items()
            path, _, own = name.rpartition(".")
            if own not in stack_parameters(model.get_submodule(path)):
                return super().convert(input_dict, full_layer_name=full_layer_name, model=model, **more)
            weight = value[0] if isinstance(value, list) else value
            expected = model.get_parameter(name).shape
            if weight.shape != expected:
                faults.append(f"its {name} is {list(weight.shape)}, expected {list(expected)} by its config")
            if weight.numel() >= MOST_NUMBERS:
                faults.append(f"its {name} has {weight.numel():,} numbers, more than can be packed in 4 bit")
            packed = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            return {name: packed.to(weight.device)}

    class Quantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
            path, _, own = param_name.rpartition(".")
            return super().param_needs_quantization(model, param_name, **more) or own in stack_parameters(
                model.get_submodule(path)
            )

        def get_quantize_ops(self) -> Any:
            return Pack(self)

        @staticmethod
        def get_modules_to_not_convert(model: Any, *given: Any, **more: Any) -> list[str]:
            found: list[str] = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *given, **more)
            return [*found, *read_directly(model)]

    key = "bitsandbytes_4bit"
    before = AUTO_QUANTIZER_MAPPING[key]
    AUTO_QUANTIZER_MAPPING[key] = Quantizer
    try:
        yield faults
    finally:
        AUTO_QUANTIZER_MAPPING[key] = before


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Inside, a module's packed experts are tensors in their compute dtype."""
    from bitsandbytes.functional import dequantize_4bit

    packed: dict[str, Any] = {name: each for name, each in stack_parameters(module).items() if is_packed(each)}
    for name, parameter in packed.items():
        del module._parameters[name]
        module.__dict__[name] = dequantize_4bit(parameter.data, parameter.quant_state)
    try:
        yield
    finally:
        for name, parameter in packed.items():
            del module.__dict__[name]
            module._parameters[name] = parameter


def unpack_in_passes(model: nn.Module) -> None:
    """Let each module with packed experts unpack them for its pass, and again for its backward."""

    def forward_of(module: nn.Module) -> Any:
        def run(*given: Any, **more: Any) -> Any:
            with unpacked(module):
                return type(module).forward(module, *given, **more)

        def forward(*given: Any, **more: Any) -> Any:
            tensors = [each for each in (*given, *more.values()) if isinstance(each, Tensor)]
            if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
                return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False, **more)
            return run(*given, **more)

        return forward

    for module in model.modules():
        if any(map(is_packed, stack_parameters(module).values())):
            module.forward = forward_of(module)


def linear_weights(model: Any) -> dict[str, nn.Parameter]:
    """The weights of a model's linear maps, but for its head: of linear layers, and of stacked experts."""
    head, found = model.get_output_embeddings(), {}
    for path, module in model.named_modules():
        if is_linear(module) and module is not head:
            found[f"{path}.weight"] = module.weight
        found |= {f"{path}.{name}": each for name, each in stack_parameters(module).items()}
    return found


def check_packed(model: Any) -> None:
    """Refuse a model most of which 4 bit would leave as it is, and packed weights of another shape than their layer."""
    weights = linear_weights(model)
    rest = {name: each for name, each in weights.items() if not is_packed(each)}
    total = sum(shape_of(each).numel() for each in weights.values())
    left = sum(each.numel() for each in rest.values())
    if left > MOST_UNPACKED * total:
        name = max(rest, key=lambda each: rest[each].numel())
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        size = sum(each.numel() * each.element_size() for each in rest.values()) / (1 << 30)
        raise OnecardError(
            f"load_in_4bit: {left / total:.0%} of the weights of {type(model).__name__} would stay in 16 bit, "
            f"{size:.3g} GiB ({name} of a {kind}, and others): transformers and bitsandbytes do not pack them."
        )
    for path, module in model.named_modules():
        if is_linear(module) and is_packed(module.weight):
            found, expected = shape_of(module.weight), (module.out_features, module.in_features)
            if tuple(found) != expected:
                raise OnecardError(f"model: {path}.weight is {list(found)} in the file, expected {list(expected)}.")
