"""Reads LoRA adapter folders onto a model and writes them, with a check of every tensor.

PEFT ignores tensors that it cannot assign: a misnamed tensor is not read, its layer keeps its initial weights, and the
adapter has less effect than it was trained to have, or none. Here file and model must have the same tensor names and
shapes; otherwise reading raises `OnecardError`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onecard.models.load import check_finite, join_names
from onecard.utils.errors import OnecardError, reason

ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
# PEFT settings that do not change what an adapter computes once its tensors are read
IGNORED_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "runtime_config", "task_type",
}  # fmt: skip
# Supported settings -> the types of their JSON values, and the types of the elements of a list or an object
SUPPORTED_SETTINGS: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    "r": ((int,), ()),
    "lora_alpha": ((int, float), ()),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_dora", "use_rslora"), ((bool,), ())),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), ((dict, NoneType), (int, float))),
    **dict.fromkeys(("exclude_modules", "layers_pattern", "target_modules"), ((str, list, NoneType), (str,))),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ((list, NoneType), (str,))),
    "layers_to_transform": ((int, list, NoneType), (int,)),
}
# Values of `init_lora_weights` that do not change the base's weights; pissa, olora, corda, loftq and lora_ga do
UNCHANGED_BASE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_settings(folder: Path, setting: str) -> Any:
    """The PEFT config of an adapter folder, with dropout 0. Unsupported adapters raise `OnecardError`.

    With dropout, old and new log-probs of one policy would differ. `setting`: name of the setting in error messages.
    """
    from peft import LoraConfig

    where = f"{setting}: adapter {folder}"
    try:
        values = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OnecardError(f"{where}: {ADAPTER_SETTINGS} cannot be read: {reason(error)}") from error
    peft_type, task = values.get("peft_type"), values.get("task_type")
    if peft_type != "LORA":
        raise OnecardError(f"{where} has peft_type {peft_type}, which is not supported yet; expected LORA.")
    if task not in (None, "CAUSAL_LM"):
        raise OnecardError(f"{where} was trained for {task}; expected CAUSAL_LM.")
    if (bias := values.get("bias", "none")) != "none":
        raise OnecardError(
            f"{where} has trained biases of the base (bias: {bias}), which stay in the base when the adapter is "
            "off; merge it with PEFT, and use the merged model."
        )
    if values.get("init_lora_weights") not in UNCHANGED_BASE_INITS:
        raise OnecardError(
            f"{where} was initialized by {values['init_lora_weights']}, which changes the base's weights; convert it "
            "to plain LoRA with PEFT's path_initial_model_for_weight_conversion."
        )
    for name in SUPPORTED_SETTINGS.keys() & values.keys():
        value, (types, element_types) = values[name], SUPPORTED_SETTINGS[name]
        elements = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        if type(value) not in types or not {type(element) for element in elements} <= {*element_types}:
            raise OnecardError(f"{where} has {name}: {json.dumps(value)}, expected the type that PEFT writes.")
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(LoraConfig)
    }
    for name, value in values.items():
        if name in IGNORED_SETTINGS or name in SUPPORTED_SETTINGS or name in ("bias", "init_lora_weights"):
            continue
        if name == "revision" and value in (None, "", "main"):
            continue
        if value != defaults.get(name) and (name in defaults or value):
            raise OnecardError(f"{where} has {name}: {json.dumps(value)}, which is not supported yet.")
    try:
        settings = LoraConfig(**{name: value for name, value in values.items() if name in defaults})
    except Exception as error:  # PEFT's checks raise different exceptions
        raise OnecardError(f"{where}: {reason(error)}") from error
    settings.lora_dropout = 0.0
    return settings


def read_weights(folder: Path, setting: str) -> dict[str, Tensor]:
    """The tensors in an adapter folder, by name, on the CPU. A damaged file raises `OnecardError`."""
    path = folder / ADAPTER_WEIGHTS
    try:
        if path.is_file():
            return load_file(str(path))
        return torch.load(folder / PICKLED_WEIGHTS, map_location="cpu", weights_only=True)
    except Exception as error:  # the parsers raise different exceptions on a damaged file
        raise OnecardError(f"{setting}: adapter {folder}: its weights cannot be read: {reason(error)}") from error


@contextmanager
def without_name_rewriting() -> Iterator[None]:
    """Context in which PEFT does not rewrite the module names in a config.

    PEFT does so for some mixture-of-experts models: gate_proj, up_proj and down_proj, also those of a shared
    expert or a dense layer, become the stacked parameters of all experts.
    """
    from peft.utils import transformers_weight_conversion as conversion

    original = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = original


def add_adapter(model: Any, settings: Any, name: str) -> Any:
    """`model` with a new adapter, which has initial weights. The first adapter wraps the model in a `PeftModel`."""
    from peft import PeftModelForCausalLM

    with without_name_rewriting():
        if not hasattr(model, "peft_config"):
            return PeftModelForCausalLM(model, settings, adapter_name=name)
        model.add_adapter(name, settings)
        return model


def adapter_tensors(model: Any, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by their names in PEFT's files. They share the parameters' memory.

    PEFT's function for this (`get_peft_model_state_dict`) omits layers whose path contains another adapter's name.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            tensors |= {f"{path}.{key}": tensor for key, tensor in module.modules_to_save[name].state_dict().items()}
        elif isinstance(module, LoraLayer):
            for part in module.adapter_layer_names:
                by_adapter = getattr(module, part)  # adapter name -> parameter or module
                if name not in by_adapter:
                    continue
                if isinstance(by_adapter[name], nn.Parameter):
                    tensors[f"{path}.{part}"] = by_adapter[name].detach()
                elif part == "lora_magnitude_vector":
                    tensors[f"{path}.{part}"] = by_adapter[name].weight.detach()
                else:
                    state = by_adapter[name].state_dict()
                    tensors |= {f"{path}.{part}.{key}": tensor for key, tensor in state.items()}
    return tensors


def base_tensors(model: Any) -> dict[str, Tensor]:
    """The base's parameters by their names in a file, without the names of adapter wrappers."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def without_base_copies(
    stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: Any, where: str
) -> dict[str, Tensor]:
    """A file's tensors without copies of base weights.

    PEFT writes such copies where embeddings are adapted or were resized. A copy whose shape or values differ from the
    base raises `OnecardError`.
    """
    base = base_tensors(model)
    adapter: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        base_name = key.replace(".base_layer.", ".")
        base_tensor = base.get(base_name)
        if key in expected or base_tensor is None:
            adapter[key] = tensor
        elif base_tensor.shape != tensor.shape:
            raise OnecardError(resized_base_message(where, base_name, tensor, base_tensor))
        elif not same_values(base_tensor.detach().cpu(), tensor):
            raise OnecardError(f"{where} has weights for {base_name} that differ from its base's.")
    return adapter


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal when both are cast to the smaller of their dtypes."""
    smaller = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(first.to(smaller), second.to(smaller))


def resized_base_message(where: str, key: str, stored: Tensor, expected: Tensor) -> str:
    """The error message for an adapter whose base had a vocabulary of another size."""
    name = key.removeprefix("base_model.model.").removesuffix(".weight")
    return (
        f"{where} was trained on a base whose {name} is {list(stored.shape)}, but it is {list(expected.shape)} in the "
        "base; if tokens were added, resize the base (resize_token_embeddings), save it, and name the saved folder as "
        "the adapter's base."
    )


def renamed_by_peft(model: Any, name: str, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A file's tensors, renamed as PEFT renames them: checkpoint names become module names.

    A conversion that creates new tensors, such as one stacked tensor of all experts, is not applied.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    try:
        converted = convert_peft_adapter_state_dict_for_transformers(
            model, model.peft_config[name], dict(stored), adapter_name=name
        )
    except Exception:  # PEFT does not know these names; `check_tensors` reports them
        return stored
    same = {id(tensor) for tensor in converted.values()} == {id(tensor) for tensor in stored.values()}
    return converted if same and len(converted) == len(stored) else stored


def file_names(model: Any, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """An adapter's tensor names -> their names in a file, such that PEFT reads each tensor into its module.

    PEFT renames the tensors of a file as transformers renames those of a checkpoint, and mistakes some module names for
    checkpoint names. The tensors of these modules are written under their checkpoint names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    read = {id(tensor): key for key, tensor in renamed_by_peft(model, name, tensors).items()}
    names = {key: key for key in tensors}
    misread = [key for key, tensor in tensors.items() if read.get(id(tensor)) != key]
    if misread:
        rules = get_model_conversion_mapping(model.get_base_model(), add_legacy=False)
        reversed_rules = [rule.reverse_transform() for rule in rules if isinstance(rule, WeightRenaming)]
        names |= {key: apply_renamings(key, reversed_rules) for key in misread}
    return names


def check_tensors(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: str) -> None:
    """Raise unless a file has exactly the tensors of the model's adapter, with the same shapes."""
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unknown:
        parts = [f"has no {join_names(missing)}"] if missing else []
        parts += [f"has {join_names(unknown)}, which the model has no place for"] if unknown else []
        raise OnecardError(f"{where} does not fit the model: it {', and it '.join(parts)}.")
    for key, tensor in expected.items():
        if tensor.shape != stored[key].shape:
            if ".lora_" in key and "embedding" not in key:
                shapes = f"{list(stored[key].shape)} instead of {list(tensor.shape)}"
                raise OnecardError(f"{where} does not fit the model: its {key} is {shapes}.")
            raise OnecardError(resized_base_message(where, key, stored[key], tensor))


@torch.no_grad()
def fill_adapter(model: Any, name: str, stored: Mapping[str, Tensor], where: str) -> None:
    """Copy a file's tensors into an adapter of a model. If any tensor is wrong, nothing is copied."""
    expected = adapter_tensors(model, name)
    if not expected.keys() <= stored.keys():
        stored = renamed_by_peft(model, name, stored)
    stored = without_base_copies(stored, expected, model, where)
    check_tensors(expected, stored, where)
    check_finite(stored, where)
    for key, tensor in expected.items():
        tensor.copy_(stored[key])


def read_adapter(model: Any, folder: Path, name: str, setting: str = "model") -> Any:
    """`model` with the adapter in `folder` added under `name`. `setting`: name of the setting in error messages."""
    where = f"{setting}: adapter {folder}"
    settings, stored = read_settings(folder, setting), read_weights(folder, setting)
    parameters_to_modules(settings, model)
    try:
        model = add_adapter(model, settings, name)
    except Exception as error:  # PEFT's checks raise ValueError, KeyError or RuntimeError
        raise OnecardError(f"{where}: {reason(error)}") from error
    fill_adapter(model, name, stored, where)
    check_head_variant(model, name, where)
    check_rescaled(model, name, where)
    return model


def check_rescaled(model: Any, name: str, where: str) -> None:
    """Raise for an adapter on weights that the model rescales in evaluation mode (`is_rescaled`)."""
    from onecard.models.targets import is_rescaled

    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}) and is_rescaled(model, path):
            raise OnecardError(f"{where} is on {path}, whose weights the model rescales in evaluation mode.")


def check_head_variant(model: Any, name: str, where: str) -> None:
    """Raise for a LoRA variant (such as DoRA) on the head: its output is not that of a single weight matrix."""
    head = model.get_base_model().get_output_embeddings()
    variant = getattr(head, "lora_variant", {}).get(name)
    if variant is not None:
        raise OnecardError(f"{where} has {type(variant).__name__} on the head; expected plain LoRA there.")


def parameters_to_modules(settings: Any, model: Any) -> None:
    """Move linear layers' weights from `target_parameters` to `target_modules`: the inverse of `config_to_write`."""
    from onecard.models.targets import is_linear

    weights = {
        f"{path.replace('.base_layer', '')}.weight": is_linear(module) or hasattr(module, "lora_A")
        for path, module in model.named_modules()
        if hasattr(module, "weight")
    }
    parameters = []
    for target in settings.target_parameters or []:
        matches = [linear for path, linear in weights.items() if path == target or path.endswith(f".{target}")]
        if matches and all(matches) and isinstance(settings.target_modules, set):
            settings.target_modules.add(target.removesuffix(".weight"))
        else:
            parameters.append(target)
    settings.target_parameters = parameters or None


def config_to_write(settings: Any, model: Any) -> Any:
    """The config to write to an adapter folder, such that PEFT without `without_name_rewriting` adapts the same layers.

    Module names that PEFT would rewrite to experts are written as `target_parameters`, which PEFT does not rewrite.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    written = copy.deepcopy(settings)
    written.inference_mode = True
    if isinstance(settings.target_modules, str):  # a regular expression
        return written
    rewritten = set()
    for target in settings.target_modules:
        single = copy.deepcopy(settings)
        single.target_modules, single.target_parameters = {target}, None
        try:
            convert_peft_config_for_transformers(single, model=model.get_base_model(), conversions=None)
        except ValueError:  # PEFT takes the target for one part of an expert's weights
            rewritten.add(target)
        else:
            rewritten |= {target} - single.target_modules
    written.target_modules = set(settings.target_modules) - rewritten
    parameters = [*(settings.target_parameters or []), *sorted(f"{target}.weight" for target in rewritten)]
    written.target_parameters = parameters or None
    return written


def write_adapter(model: Any, name: str, folder: Path) -> None:
    """Write an adapter folder that PEFT loads: weights and config."""
    tensors = adapter_tensors(model, name)
    weights = {written: tensors[key].contiguous() for key, written in file_names(model, name, tensors).items()}
    save_file(weights, str(folder / ADAPTER_WEIGHTS))
    config_to_write(model.peft_config[name], model).save_pretrained(str(folder))
