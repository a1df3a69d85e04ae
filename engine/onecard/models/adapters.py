"""LoRA adapters: how a folder is read onto a model and written, with every tensor accounted for.

PEFT leaves out what it cannot place: a tensor that is misnamed stays unread, its layer as it was initialized, and the
adapter does less than it learned, or nothing. Here the file and the model must name the same tensors of the same
shapes, or the folder is refused in one line.
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

from onecard.models.load import check_finite, listed
from onecard.utils.errors import OnecardError, reason

ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
# Settings of PEFT that do not change what an adapter computes once its tensors are read
NO_MATTER = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "runtime_config", "task_type",
}  # fmt: skip
# Settings that are followed: the types of their values in JSON, and those of the parts of a list or an object
FOLLOWED: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    "r": ((int,), ()),
    "lora_alpha": ((int, float), ()),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_dora", "use_rslora"), ((bool,), ())),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), ((dict, NoneType), (int, float))),
    **dict.fromkeys(("exclude_modules", "layers_pattern", "target_modules"), ((str, list, NoneType), (str,))),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ((list, NoneType), (str,))),
    "layers_to_transform": ((int, list, NoneType), (int,)),
}
# How new weights are drawn; all others (pissa, olora, corda, loftq, lora_ga) take something out of the base's weights
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_settings(folder: Path, setting: str) -> Any:
    """The PEFT config of an adapter folder, without dropout, or an error if the adapter is none that can be read.

    Dropout would make old and new log-probs of one policy differ.
    """
    from peft import LoraConfig

    where = f"{setting}: adapter {folder}"
    try:
        values = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OnecardError(f"{where}: {ADAPTER_SETTINGS} cannot be read: {reason(error)}") from error
    kind, task = values.get("peft_type"), values.get("task_type")
    if kind != "LORA":
        raise OnecardError(f"{where} is of kind {kind}, which is not supported yet; expected LORA.")
    if task not in (None, "CAUSAL_LM"):
        raise OnecardError(f"{where} was trained for {task}; expected CAUSAL_LM.")
    if (bias := values.get("bias", "none")) != "none":
        raise OnecardError(
            f"{where} trained biases of the base (bias: {bias}), so with the adapter off the base would not be what it "
            "was; merge it with PEFT, and give the merged model."
        )
    if values.get("init_lora_weights") not in PLAIN_INITS:
        raise OnecardError(
            f"{where} was begun by {values['init_lora_weights']}, which changes the base's weights; convert it to "
            "plain LoRA with PEFT's path_initial_model_for_weight_conversion."
        )
    for name in FOLLOWED.keys() & values.keys():
        value, (types, of_parts) = values[name], FOLLOWED[name]
        parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        if type(value) not in types or not {type(part) for part in parts} <= {*of_parts}:
            raise OnecardError(f"{where} has {name}: {json.dumps(value)}, which PEFT would not have written.")
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(LoraConfig)
    }
    for name, value in values.items():
        if name in NO_MATTER or name in FOLLOWED or name in ("bias", "init_lora_weights"):
            continue
        if name == "revision" and value in (None, "", "main"):
            continue
        if value != defaults.get(name) and (name in defaults or value):
            raise OnecardError(f"{where} has {name}: {json.dumps(value)}, which is not supported yet.")
    try:
        settings = LoraConfig(**{name: value for name, value in values.items() if name in defaults})
    except Exception as error:  # PEFT raises as its checks do
        raise OnecardError(f"{where}: {reason(error)}") from error
    settings.lora_dropout = 0.0
    return settings


def read_weights(folder: Path, setting: str) -> dict[str, Tensor]:
    """An adapter's tensors on the CPU."""
    path = folder / ADAPTER_WEIGHTS
    try:
        if path.is_file():
            return load_file(str(path))
        return torch.load(folder / PICKLED_WEIGHTS, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file: whatever the parsers raise
        raise OnecardError(f"{setting}: adapter {folder}: its weights cannot be read: {reason(error)}") from error


@contextmanager
def literal_names() -> Iterator[None]:
    """Inside, PEFT takes the names in a config as they are.

    For some mixtures of experts it would rewrite them on every model: gate_proj, up_proj and down_proj, of a shared
    expert or a dense layer too, become the stacked parameters of all experts.
    """
    from peft.utils import transformers_weight_conversion as conversion

    own = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *given, **more: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = own


def add_adapter(model: Any, settings: Any, name: str) -> Any:
    """`model` with one more adapter, whose weights are new. The first one wraps the model."""
    from peft import PeftModelForCausalLM

    with literal_names():
        if not hasattr(model, "peft_config"):
            return PeftModelForCausalLM(model, settings, adapter_name=name)
        model.add_adapter(name, settings)
        return model


def adapter_tensors(model: Any, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter by the names that PEFT gives them in a file. They share the parameters' memory.

    PEFT's own function leaves out each layer in whose path the name of another adapter stands.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            found |= {f"{path}.{key}": each for key, each in module.modules_to_save[name].state_dict().items()}
        elif isinstance(module, LoraLayer):
            for part in module.adapter_layer_names:
                held = getattr(module, part)
                if name not in held:
                    continue
                if isinstance(held[name], nn.Parameter):
                    found[f"{path}.{part}"] = held[name].detach()
                elif part == "lora_magnitude_vector":
                    found[f"{path}.{part}"] = held[name].weight.detach()
                else:
                    found |= {f"{path}.{part}.{key}": each for key, each in held[name].state_dict().items()}
    return found


def base_tensors(model: Any) -> dict[str, Tensor]:
    """The base's parameters by the names that they have in a file, whatever adapters are around them."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def without_base(found: Mapping[str, Tensor], own: Mapping[str, Tensor], model: Any, where: str) -> dict[str, Tensor]:
    """A file's tensors without copies of the base's, which PEFT writes where embeddings are adapted or were resized."""
    base = base_tensors(model)
    kept: dict[str, Tensor] = {}
    for key, tensor in found.items():
        plain = key.replace(".base_layer.", ".")
        held = base.get(plain)
        if key in own or held is None:
            kept[key] = tensor
        elif held.shape != tensor.shape:
            raise OnecardError(resized(where, plain, tensor, held))
        elif not same_values(held.detach().cpu(), tensor):
            raise OnecardError(f"{where} holds other weights for {plain} than its base; expected an adapter alone.")
    return kept


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal in the narrower of their types."""
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(first.to(narrow), second.to(narrow))


def resized(where: str, key: str, found: Tensor, held: Tensor) -> str:
    """The error of an adapter whose base had another vocabulary."""
    name = key.removeprefix("base_model.model.").removesuffix(".weight")
    return (
        f"{where} was trained on a base whose {name} is {list(found.shape)}, but it is {list(held.shape)} in the base; "
        "where tokens were added, resize the base (resize_token_embeddings), save it, and name that one as the base."
    )


def as_peft_reads(model: Any, name: str, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A file's tensors under the names that PEFT takes them for: those of modules, for those of checkpoints.

    Names alone change: what makes new tensors (of one for each expert a stacked one) is not taken.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    try:
        made = convert_peft_adapter_state_dict_for_transformers(
            model, model.peft_config[name], dict(found), adapter_name=name
        )
    except Exception:  # of names that are no adapter's; they are refused by the caller
        return found
    same = {id(tensor) for tensor in made.values()} == {id(tensor) for tensor in found.values()}
    return made if same and len(made) == len(found) else found


def file_names(model: Any, name: str, own: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each of an adapter's tensors in a file, so that PEFT reads it as what it is.

    PEFT renames what it reads as transformers renames a checkpoint's weights, and takes some modules' own names for a
    checkpoint's. These are written as a checkpoint names them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    read = {id(tensor): key for key, tensor in as_peft_reads(model, name, own).items()}
    names = {key: key for key in own}
    lost = [key for key, tensor in own.items() if read.get(id(tensor)) != key]
    if lost:
        rules = get_model_conversion_mapping(model.get_base_model(), add_legacy=False)
        back = [each.reverse_transform() for each in rules if isinstance(each, WeightRenaming)]
        names |= {key: apply_renamings(key, back) for key in lost}
    return names


def check_tensors(own: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Stop unless a file has the tensors that a model's adapter consists of, and no others."""
    missing, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing or unknown:
        parts = [f"has no {listed(missing)}"] if missing else []
        parts += [f"has {listed(unknown)}, which the model has no place for"] if unknown else []
        raise OnecardError(f"{where} does not fit the model: it {', and it '.join(parts)}.")
    for key, tensor in own.items():
        if tensor.shape != found[key].shape:
            if ".lora_" in key and "embedding" not in key:
                shapes = f"{list(found[key].shape)} instead of {list(tensor.shape)}"
                raise OnecardError(f"{where} does not fit the model: its {key} is {shapes}.")
            raise OnecardError(resized(where, key, found[key], tensor))


@torch.no_grad()
def fill_adapter(model: Any, name: str, found: Mapping[str, Tensor], where: str) -> None:
    """Copy a file's tensors into an adapter of a model, all of them or none."""
    own = adapter_tensors(model, name)
    if not own.keys() <= found.keys():
        found = as_peft_reads(model, name, found)
    found = without_base(found, own, model, where)
    check_tensors(own, found, where)
    check_finite(found, where)
    for key, tensor in own.items():
        tensor.copy_(found[key])


def read_adapter(model: Any, folder: Path, name: str, setting: str = "model") -> Any:
    """`model` with the adapter in `folder`, called `name`; wrapped if it is the first. `setting` names the folder."""
    where = f"{setting}: adapter {folder}"
    settings, found = read_settings(folder, setting), read_weights(folder, setting)
    as_modules(settings, model)
    try:
        model = add_adapter(model, settings, name)
    except Exception as error:  # PEFT raises ValueError, KeyError or RuntimeError as its checks do
        raise OnecardError(f"{where}: {reason(error)}") from error
    fill_adapter(model, name, found, where)
    check_head(model, name, where)
    check_rescaled(model, name, where)
    return model


def check_rescaled(model: Any, name: str, where: str) -> None:
    """Refuse an adapter that is another function in evaluation mode than it was in training."""
    from onecard.models.targets import is_rescaled

    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}) and is_rescaled(model, path):
            raise OnecardError(f"{where} is on {path}, whose weights the model rescales in evaluation mode.")


def check_head(model: Any, name: str, where: str) -> None:
    """Refuse a variant of LoRA on the head, whose output no single weight stands for."""
    head = model.get_base_model().get_output_embeddings()
    variant = getattr(head, "lora_variant", {}).get(name)
    if variant is not None:
        raise OnecardError(f"{where} has {type(variant).__name__} on the head; expected plain LoRA there.")


def as_modules(settings: Any, model: Any) -> None:
    """Turn the weights of linear layers among `target_parameters`, as `portable` writes them, into modules."""
    from onecard.models.targets import is_linear

    weights = {
        f"{path.replace('.base_layer', '')}.weight": is_linear(module) or hasattr(module, "lora_A")
        for path, module in model.named_modules()
        if hasattr(module, "weight")
    }
    kept = []
    for target in settings.target_parameters or []:
        reached = [linear for path, linear in weights.items() if path == target or path.endswith(f".{target}")]
        if reached and all(reached) and isinstance(settings.target_modules, set):
            settings.target_modules.add(target.removesuffix(".weight"))
        else:
            kept.append(target)
    settings.target_parameters = kept or None


def portable(settings: Any, model: Any) -> Any:
    """The config as PEFT alone reads it with the same result.

    Names that PEFT would take for experts (`literal_names`) are written as `target_parameters`, which it leaves alone.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    made = copy.deepcopy(settings)
    made.inference_mode = True
    if isinstance(settings.target_modules, str):  # a pattern
        return made
    taken = set()
    for target in settings.target_modules:
        alone = copy.deepcopy(settings)
        alone.target_modules, alone.target_parameters = {target}, None
        try:
            convert_peft_config_for_transformers(alone, model=model.get_base_model(), conversions=None)
        except ValueError:  # a part of what are the experts' to PEFT
            taken.add(target)
        else:
            taken |= {target} - alone.target_modules
    made.target_modules = set(settings.target_modules) - taken
    made.target_parameters = [*(settings.target_parameters or []), *sorted(f"{target}.weight" for target in taken)]
    made.target_parameters = made.target_parameters or None
    return made


def write_adapter(model: Any, name: str, folder: Path) -> None:
    """Write an adapter so that PEFT loads it."""
    own = adapter_tensors(model, name)
    weights = {written: own[key].contiguous() for key, written in file_names(model, name, own).items()}
    save_file(weights, str(folder / ADAPTER_WEIGHTS))
    portable(model.peft_config[name], model).save_pretrained(str(folder))
