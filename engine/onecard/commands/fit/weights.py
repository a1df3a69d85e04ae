"""A run's weights on `meta`: the base that a config describes (in NF4 with `load_in_4bit`), adapters and heads.

No weights are read and nothing is computed. The tensors have the shapes and dtypes of those of the run, and belong to
the same modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onecard.config import ModelConfig, TrainConfig
from onecard.data.batches import TokenSequence, pack, to_device
from onecard.models.adapters import ADAPTER_SETTINGS, add_adapter, parameters_to_modules, read_settings
from onecard.models.attention import use_onecard_attention
from onecard.models.build import lora_config, new_scalar_head
from onecard.models.folders import weights_folder
from onecard.models.four_bit import (
    check_quantized,
    dequantize_in_forward,
    layers_read_directly,
    nf4_settings,
    stacked_experts,
)
from onecard.models.load import model_class, reason, without_dropout
from onecard.models.memory_options import apply_memory_options
from onecard.models.role_setup import RoleSetup
from onecard.models.roles import Roles
from onecard.models.targets import Targets, find_targets
from onecard.models.trunk import context_of, trunk_of
from onecard.training.startup import SHORT_LENGTH, layout_candidates
from onecard.utils.errors import OnecardError

META = torch.device("meta")
BLOCK, NESTED_BLOCK = 64, 256  # block sizes of bitsandbytes' NF4, and of the double quantization of its statistics


def dtype_for(config: ModelConfig, target: torch.device, *, train_all: bool) -> torch.dtype:
    """`models.load.pick_dtype` for a target device. A planned GPU supports bfloat16."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if train_all or target.type == "cpu" else torch.bfloat16


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def nf4_weight(layer: Any, dtype: torch.dtype, shape: Sequence[int] = ()) -> Any:
    """bitsandbytes' NF4 weight of a layer, with double quantization, on meta.

    `shape`: shape of stacked experts; empty: that of a linear layer.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    shape = torch.Size(shape or (layer.out_features, layer.in_features))
    blocks = math.ceil(shape.numel() / BLOCK)
    nested = QuantState(
        absmax=empty(math.ceil(blocks / NESTED_BLOCK), dtype=torch.float32),
        code=empty(256, dtype=torch.float32),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=empty(blocks, dtype=torch.uint8),
        shape=shape,
        code=empty(16, dtype=torch.float32),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=empty(dtype=torch.float32),
        state2=nested,
    )
    packed = empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8)
    weight = Params4bit(packed, False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer)
    layer.quant_state = state
    return weight


def quantize(model: Any, dtype: torch.dtype) -> Any:
    """Quantize what `models.load.load_base` quantizes: linear layers except the head, and stacked experts."""
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    unquantized = [*get_keys_to_not_convert(model), *layers_read_directly(model)]
    model = replace_with_bnb_linear(model, modules_to_not_convert=unquantized, quantization_config=nf4_settings(dtype))
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.weight = nf4_weight(layer, dtype)
            if layer.bias is not None:  # created in torch's default dtype; the loader casts it
                layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        for name, parameter in stacked_experts(layer).items():
            setattr(layer, name, nf4_weight(layer, dtype, parameter.shape))
    check_quantized(model)
    dequantize_in_forward(model)
    model.is_loaded_in_4bit = True
    return model


def load_peak(model: Any) -> int:
    """Bytes that loading needs besides the weights: the largest layer in 16 bit and its statistics in fp32."""
    from bitsandbytes.nn import Params4bit

    largest = 0
    for weight in model.parameters():
        if isinstance(weight, Params4bit):
            size = weight.quant_state.shape.numel()
            largest = max(largest, size * weight.quant_state.dtype.itemsize + 3 * 4 * math.ceil(size / BLOCK))
    return largest


def plan_base(settings: Any, config: ModelConfig, target: torch.device, *, train_all: bool = False) -> Any:
    """`models.load.load_base` on meta. `settings`: the transformers config of the base."""
    dtype = dtype_for(config, target, train_all=train_all)
    attention = None if config.attn_implementation == "auto" else config.attn_implementation
    try:
        with META:
            model = model_class(settings).from_config(
                without_dropout(settings), dtype=dtype, attn_implementation=attention
            )
        if config.load_in_4bit:
            model = quantize(model, dtype)
    except OnecardError:
        raise
    except Exception as error:  # a model class may raise any exception on unusual sizes
        raise OnecardError(f"model: nothing can be built of this config: {reason(error)}") from error
    if config.attn_implementation == "auto":
        use_onecard_attention(model)
    return model.requires_grad_(train_all)


def add_adapters(model: Any, config: TrainConfig, setup: RoleSetup) -> Any:
    """`models.build.add_adapters` on meta.

    The adapters of the policy and of the reference have the settings of the adapter folder that `config.model` names,
    if it names one. Other folders do not have to exist: their adapters are planned as new ones.
    """
    names = setup.roles_by_adapter()
    targets = find_targets(model, config.lora_target_modules) if names else Targets(())
    if targets.parameters:
        raise OnecardError(f"lora_target_modules: adapters on experts ({targets.parameters[0]}) cannot be planned.")
    base, folder = model, weights_folder(Path(config.model))
    with META:
        for name, role in names.items():
            if name in (setup.trained[0], "reference") and (folder / ADAPTER_SETTINGS).is_file():
                settings = read_settings(folder, "model")
                parameters_to_modules(settings, model)
            else:
                settings = lora_config(config, base, targets, scalar=role in setup.scalar)
            model = add_adapter(model, settings, name)
    return model


@torch.no_grad()
def choose_layout(roles: Roles) -> None:
    """Set the first layout that the model runs in. `startup.choose_layout` does the same with real weights."""
    context = context_of(trunk_of(roles.causal_model()).config) or SHORT_LENGTH
    for own_attention, layout in layout_candidates(roles):
        if not own_attention:
            roles.use_transformers_attention()
        length = (
            context // 2 + 1 if layout == "restarted" else SHORT_LENGTH
        )  # some models have masks of the context's length
        sequences = [TokenSequence((0,) * length, (False,) + (True,) * (length - 1))] * 2
        roles.layout = layout
        try:
            roles.hidden(to_device(pack(sequences), META), torch.arange(2, device=META))
            return
        except (RuntimeError, TypeError, ValueError, AttributeError, OnecardError):
            continue


def plan_roles(base: Any, copy: Any, config: TrainConfig, setup: RoleSetup) -> Roles:
    """`models.build.load_roles` and `load_ppo_roles` on meta. `copy`: full copy of the model as reference, or None."""
    model = add_adapters(base, config, setup)
    roles = Roles(model, setup.trained, dict(setup.adapters), "packed" if config.padding_free else "padded")
    choose_layout(roles)
    apply_memory_options(roles, config)
    if copy is not None:
        roles.copies["reference"] = copy.requires_grad_(False)
    for role in setup.scalar:
        roles.heads[role] = new_scalar_head(roles).requires_grad_(role in setup.trained)
    return roles
