"""NF4 weights: transformers and bitsandbytes quantize linear layers; this module adds stacked experts.

The experts of a mixture-of-experts layer are one parameter [E, out, in]. It is quantized while it is loaded, so the
model is never in memory in 16 bit as a whole. A forward pass dequantizes the experts of one layer at a time, and the
backward pass dequantizes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onecard.models.targets import has_stacked_experts, is_linear, is_mamba_mixer
from onecard.utils.errors import OnecardError

MAX_16_BIT_SHARE = 0.1  # largest share of linear weights that may stay in 16 bit
ELEMENT_LIMIT = 1 << 31  # bitsandbytes' kernels take tensors with fewer elements than this


def nf4_settings(dtype: torch.dtype) -> Any:
    """transformers' quantization config: NF4 with double quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def stacked_experts(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters [E, out, in] of a module of stacked experts; empty for other modules."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if has_stacked_experts(module) and len(original_shape(parameter)) == 3
    }


def original_shape(parameter: Tensor) -> torch.Size:
    """The shape that a weight has, or had before quantization."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter is quantized to 4 bit."""
    return getattr(parameter, "quant_state", None) is not None


def layers_read_directly(model: nn.Module) -> list[str]:
    """Linear layers that cannot be quantized, because the model reads their weights instead of calling them.

    Gemma 3n clamps the weights of AltUp's layers in training mode; Mamba's kernels multiply with those of dt_proj.
    """
    mixers = [path for path, module in model.named_modules() if is_mamba_mixer(module)]
    clamped = [path for path, _ in model.named_modules() if path.endswith(("prediction_coefs", "correction_coefs"))]
    return [f"{path}.dt_proj" for path in mixers] + clamped


@contextmanager
def quantizing_experts(enabled: bool) -> Iterator[list[str]]:
    """Context in which transformers also quantizes stacked experts when it loads a model in 4 bit.

    Yields a list to which loading adds error messages. With `enabled` False nothing is changed.
    """
    if not enabled:
        yield []
        return
    from bitsandbytes.nn import Params4bit
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    faults: list[str] = []

    class QuantizeExperts(Bnb4bitQuantize):
        def convert(self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **kwargs: Any) -> Any:
            [(name, value)] = input_dict.items()
            path, _, parameter = name.rpartition(".")
            if parameter not in stacked_experts(model.get_submodule(path)):
                return super().convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
            weight = value[0] if isinstance(value, list) else value
            expected = model.get_parameter(name).shape
            if weight.shape != expected:
                faults.append(f"its {name} is {list(weight.shape)}, expected {list(expected)} by its config")
            if weight.numel() >= ELEMENT_LIMIT:
                faults.append(f"its {name} has {weight.numel():,} elements, more than bitsandbytes can quantize")
            quantized = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            return {name: quantized.to(weight.device)}

    class Quantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            path, _, parameter = param_name.rpartition(".")
            return super().param_needs_quantization(model, param_name, **kwargs) or parameter in stacked_experts(
                model.get_submodule(path)
            )

        def get_quantize_ops(self) -> Any:
            return QuantizeExperts(self)

        @staticmethod
        def get_modules_to_not_convert(model: Any, *args: Any, **kwargs: Any) -> list[str]:
            modules: list[str] = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs)
            return [*modules, *layers_read_directly(model)]

    key = "bitsandbytes_4bit"
    before = AUTO_QUANTIZER_MAPPING[key]
    AUTO_QUANTIZER_MAPPING[key] = Quantizer
    try:
        yield faults
    finally:
        AUTO_QUANTIZER_MAPPING[key] = before


@contextmanager
def dequantized(module: nn.Module) -> Iterator[None]:
    """Context in which a module's quantized experts are dequantized tensors in their compute dtype."""
    from bitsandbytes.functional import dequantize_4bit

    quantized: dict[str, Any] = {
        name: parameter for name, parameter in stacked_experts(module).items() if is_quantized(parameter)
    }
    for name, parameter in quantized.items():
        del module._parameters[name]
        module.__dict__[name] = dequantize_4bit(parameter.data, parameter.quant_state)
    try:
        yield
    finally:
        for name, parameter in quantized.items():
            del module.__dict__[name]
            module._parameters[name] = parameter


def dequantize_in_forward(model: nn.Module) -> None:
    """Wrap the forward of each module with quantized experts: they are dequantized in the forward and the backward."""

    def forward_of(module: nn.Module) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with dequantized(module):
                return type(module).forward(module, *args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)]
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return run(*args, **kwargs)

        return forward

    for module in model.modules():
        if any(map(is_quantized, stacked_experts(module).values())):
            module.forward = forward_of(module)


def linear_weights(model: Any) -> dict[str, nn.Parameter]:
    """The weights of a model's linear layers, except its head, and of its stacked experts, by name."""
    head, weights = model.get_output_embeddings(), {}
    for path, module in model.named_modules():
        if is_linear(module) and module is not head:
            weights[f"{path}.weight"] = module.weight
        weights |= {f"{path}.{name}": parameter for name, parameter in stacked_experts(module).items()}
    return weights


def check_quantized(model: Any) -> None:
    """Raise if more than `MAX_16_BIT_SHARE` of the linear weights stay in 16 bit, or a shape is not its layer's."""
    weights = linear_weights(model)
    unquantized = {name: weight for name, weight in weights.items() if not is_quantized(weight)}
    total = sum(original_shape(weight).numel() for weight in weights.values())
    in_16_bit = sum(weight.numel() for weight in unquantized.values())
    if in_16_bit > MAX_16_BIT_SHARE * total:
        name = max(unquantized, key=lambda key: unquantized[key].numel())
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        size = sum(weight.numel() * weight.element_size() for weight in unquantized.values()) / (1 << 30)
        raise OnecardError(
            f"load_in_4bit: {in_16_bit / total:.0%} of the weights of {type(model).__name__} would stay in 16 bit, "
            f"{size:.3g} GiB ({name} of a {kind}, and others): transformers and bitsandbytes do not quantize them."
        )
    for path, module in model.named_modules():
        if is_linear(module) and is_quantized(module.weight):
            stored, expected = original_shape(module.weight), (module.out_features, module.in_features)
            if tuple(stored) != expected:
                raise OnecardError(f"model: {path}.weight is {list(stored)} in the file, expected {list(expected)}.")
