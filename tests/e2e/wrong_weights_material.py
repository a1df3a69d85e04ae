"""Models and adapters that are not what they seem, each made of a right one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.bad_input_material import change_json

Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Tensors], Tensors]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def renamed(before: str, after: str, only: str = "") -> Spoil:
    return lambda found: {k.replace(before, after) if only in k else k: v for k, v in found.items()}


def without(part: str) -> Spoil:
    return lambda found: {key: value for key, value in found.items() if part not in key}


def plus(key: str, *shape: int) -> Spoil:
    return lambda found: {**found, key: torch.zeros(shape)}


def filled(part: str, value: float) -> Spoil:
    return lambda found: {k: v.index_fill(-1, torch.tensor([3]), value) if part in k else v for k, v in found.items()}


def wider(part: str) -> Spoil:
    return lambda found: {k: torch.cat([v, v]) if part in k else v for k, v in found.items()}


NO_PLACE = "which the model has no place for"
UNKNOWN = "which is not supported yet"

# kind -> what is done to the weights, what to the config, and what the line says of it
BASES: dict[str, tuple[Spoil | None, dict[str, Any], list[str]]] = {
    "no head": (without("lm_head"), {}, ["has no weights for lm_head.weight."]),
    "compiled": (
        renamed("model.", "_orig_mod.model."),
        {},
        ["has no weights for model.", "and 17 more", "no place for: _orig_mod.model."],
    ),
    "layer missing": (without("layers.1."), {}, ["has no weights for model.layers.1.", "and 6 more"]),
    "layer left over": (None, {"num_hidden_layers": 1}, ["its config has no place for: model.layers.1."]),
    "other shape": (None, {"intermediate_size": 95}, ["down_proj.weight is [64, 96], expected [64, 95]"]),
    "value head": (plus("v_head.summary.weight", 1, 64), {}, ["no place for: v_head.summary.weight"]),
    "classifier": (None, {"architectures": ["LlamaForSequenceClassification"]}, ["Classification, which classifies"]),
    "classifier's head": (
        lambda found: plus("score.weight", 2, 64)(without("lm_head")(found)),
        {},
        ["no weights for lm_head.weight, and has weights", "score.weight"],
    ),
    "masked": (None, {"architectures": ["BertForMaskedLM"]}, ["BertForMaskedLM, which fills gaps"]),
    "NaN": (filled("layers.1.mlp.up_proj", torch.nan), {}, ["NaN or infinite: model.layers.1.mlp.up_proj.weight."]),
    "encoder": (None, {"is_encoder_decoder": True}, ["is an encoder with a decoder"]),
}
ADAPTERS: dict[str, tuple[Spoil | None, dict[str, Any], list[str]]] = {
    "prefix": (
        renamed("base_model.model.", "base_model.model._orig_mod."),
        {},
        ["it has no base_model.model.model.", "it has base_model.model._orig_mod.", NO_PLACE],
    ),
    "doubled": (
        renamed("base_model.model.", "base_model.model.base_model.model."),
        {},
        ["it has no base_model.model.model.", "it has base_model.model.base_model.", NO_PLACE],
    ),
    "half misnamed": (renamed(".layers.", ".blocks.", only="layers.1."), {}, ["layers.1.", "blocks.1.", NO_PLACE]),
    "layer missing": (without("layers.1.self_attn.v_proj"), {}, ["has no", "layers.1.self_attn.v_proj.lora_A.weight"]),
    "half there": (without("q_proj.lora_B"), {}, ["has no", "q_proj.lora_B.weight"]),
    "empty": (lambda found: {}, {}, ["has no base_model.model.model."]),
    "target missing": (None, {"target_modules": ["q_proj", "lm_head"]}, ["has no base_model.model.lm_head.lora_A"]),
    "left over": (plus(f"{FIRST}_norm.lora_A.weight", 16, 64), {}, [f"it has {FIRST}_norm.lora_A.weight, {NO_PLACE}"]),
    "other rank": (None, {"r": 8}, ["lora_A.weight is [16, ", "instead of [8, "]),
    "other shape": (wider("layers.0.self_attn.q_proj.lora_B"), {}, ["lora_B.weight is [128, 16] instead of [64, 16]"]),
    "other kind": (None, {"peft_type": "LOHA"}, [f"has peft_type LOHA, {UNKNOWN}; expected LORA"]),
    "classifier's": (None, {"task_type": "SEQ_CLS"}, ["was trained for SEQ_CLS"]),
    "biases": (None, {"bias": "lora_only"}, ["trained biases of the base (bias: lora_only)"]),
    "pissa": (None, {"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4, which changes the base's weights"]),
    "aLoRA": (None, {"alora_invocation_tokens": [3]}, [f"has alora_invocation_tokens: [3], {UNKNOWN}"]),
    "copied layers": (None, {"layer_replication": [[0, 2]]}, [f"has layer_replication: [[0, 2]], {UNKNOWN}"]),
    "of tomorrow": (None, {"use_spin": True}, [f"has use_spin: true, {UNKNOWN}"]),
    "resized": (
        plus("base_model.model.model.embed_tokens.weight", 302, 64),
        {},
        ["whose model.embed_tokens is [302, 64], but it is [300, 64] in the base"],
    ),
    "resized head": (
        plus("base_model.model.lm_head.weight", 302, 64),
        {"modules_to_save": ["lm_head"], "target_modules": TARGETS},
        ["whose lm_head is [302, 64], but it is [300, 64] in the base"],
    ),
    "infinite": (filled(f"{FIRST}.lora_B", torch.inf), {}, [f"NaN or infinite: {FIRST}.lora_B.weight."]),
    "other base": (
        plus("base_model.model.lm_head.weight", 300, 64),
        {},
        ["has weights for", "that differ from its base's"],
    ),
}


def change(folder: Path, weights: str, config: str, spoil: Spoil | None, **values: Any) -> Path:
    if spoil is not None:
        found = spoil(load_file(folder / weights))
        save_file({key: value.clone() for key, value in found.items()}, folder / weights, metadata={"format": "pt"})
    change_json(folder / config, **values)
    return folder


def write_bases(folder: Path, right: Path) -> None:
    for name, (spoil, values, _) in BASES.items():
        change(shutil.copytree(right, folder / name), "model.safetensors", "config.json", spoil, **values)


def write_adapters(folder: Path, right: Path) -> None:
    """Of each wrong adapter one; two that name each other as base, and one that names itself."""
    for name, (spoil, values, _) in ADAPTERS.items():
        made = shutil.copytree(right, folder / name)
        change(made, "adapter_model.safetensors", "adapter_config.json", spoil, **values)
    for name, base in {"itself": "itself", "first": "second", "second": "first"}.items():
        shutil.copytree(right, folder / name)
        change_json(folder / name / "adapter_config.json", base_model_name_or_path=str(folder / base))


def on_base(adapter: Path, folder: Path, base: Path) -> Path:
    """The adapter, on another base."""
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    return folder
