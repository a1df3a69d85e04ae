"""From a name or folder to a tokenizer and a base model, with one clear line where that cannot be done."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onecard.config import ModelConfig
from onecard.errors import OnecardError, is_out_of_memory
from onecard.models.attention import use_own_attention
from onecard.models.trunk import context_of
from onecard.runs import TRAINED, holds_weights, weights_folder

# bitsandbytes warns on CPU that an optional faster kernel is not installed; the one it falls back to is exact.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Source:
    """Where weights come from: a base, and the adapter folder that was named if one was."""

    base: str
    adapter: Path | None = None


def find_source(model: str) -> Source:
    """Tell a hub name, a model folder, an adapter folder and a run folder apart."""
    if not model:
        raise OnecardError("--model is missing: give a Hugging Face name or a folder.")
    path = weights_folder(Path(model))
    if (path / "adapter_config.json").is_file():
        try:
            base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = None
        if not isinstance(base, str) or not base:
            raise OnecardError(f"model: {path}/adapter_config.json does not name its base model.")
        # Without this, a folder named like a hub repository would be looked up there.
        if not any((path / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
            raise OnecardError(f"model: adapter {path} has no adapter_model.safetensors.")
        return Source(base=find_source(base).base, adapter=path)
    if path.is_dir():
        if not holds_weights(path):
            unfinished = (path / "config.yaml").is_file()
            hint = f", nor {' or '.join(TRAINED)}, which a run writes at its end" if unfinished else ""
            raise OnecardError(f"model: folder {model} has neither config.json nor adapter_config.json{hint}.")
        # An absolute path, so that an adapter made from here finds its base from any other folder too.
        return Source(base=os.path.abspath(path))
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise OnecardError(f"model: no folder {model}; expected a model folder or a Hugging Face name.")
    return Source(base=model)


def reason(error: Exception) -> str:
    """The first line of a library's message, or two where the first only announces: the rest is advice."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:300]


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the adapter folder if it holds one, else of the base. Its `generation_eos` are the ids that the
    model's generation config ends responses with.
    """
    from transformers import AutoTokenizer

    source = find_source(config.model)
    own = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    name = str(source.adapter) if own else source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the loaders below raise whatever their parsers raise
        raise OnecardError(f"model: cannot load the tokenizer of '{name}': {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise OnecardError(f"model: the tokenizer of '{name}' has no EOS token, so no response could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks, never ids, decide what is padding
    tokenizer.generation_eos = generation_eos(source.base, trust_remote_code=config.trust_remote_code)
    return tokenizer


def generation_eos(base: str, *, trust_remote_code: bool) -> frozenset[int]:
    """The EOS ids of the base's generation config, or of its config if it has none, as in transformers' `generate`."""
    from transformers import AutoConfig, GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(base)
    except Exception:  # no such file
        try:
            found = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).get_text_config()
        except Exception as error:
            raise OnecardError(f"model: cannot load '{base}': {reason(error)}") from error
    ids = getattr(found, "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def context_length(config: ModelConfig) -> int | None:
    """How many positions the base was made for, where its config says so."""
    from transformers import AutoConfig

    name = find_source(config.model).base
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise OnecardError(f"model: cannot load '{name}': {reason(error)}") from error
    return context_of(found.get_text_config())


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(config: ModelConfig, *, train_all: bool) -> torch.dtype:
    """`auto`: 16 bit for a frozen base on a GPU; float32 on CPU, and where small updates must not be rounded away."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if train_all or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def pick_attention(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """`auto`: flash-attn where it can run; else None, what transformers takes: PyTorch's own, if the model can."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    new_enough = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    can_flash = new_enough and dtype != torch.float32 and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if can_flash else None


def is_dropout(name: object, value: object) -> bool:
    """Whether an entry of a model's config is noise in training: dropout, skipped layers, router jitter."""
    return isinstance(value, float) and any(word in str(name) for word in ("drop", "jitter"))


def without_dropout(model_config: Any) -> Any:
    """The same config with every dropout at 0: with dropout, old and new log-probs of one policy would differ."""
    from transformers import PretrainedConfig

    for name, value in list(vars(model_config).items()):
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif is_dropout(name, value):
            setattr(model_config, name, 0.0)
    return model_config


def dropouts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The dropout probabilities among a config's entries, nested ones included.

    >>> dropouts({"hidden_size": 8, "text_config": {"attention_dropout": 0.1}})
    {'text_config': {'attention_dropout': 0.1}}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {name: inner} if (inner := dropouts(value)) else {}
        elif is_dropout(name, value):
            found[name] = value
    return found


def save_model(model: Any, folder: Path) -> None:
    """Write a plain Hugging Face model; its config has the dropout that it came with, which training turns off."""
    model.save_pretrained(str(folder))
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    put_back(settings, getattr(model, "dropouts", {}))
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def put_back(settings: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set each of `values`, nested ones in their place, where `settings` has such an entry."""
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(settings.get(name), dict):
            put_back(settings[name], value)
        elif name in settings:
            settings[name] = value


def keep_differentiable(model: Any) -> Any:
    """Forbid bitsandbytes' inference-only weight layout on CPU, and give the model back.

    On a CPU with AVX512-BF16, a 4-bit layer that runs once in evaluation mode repacks its weights for good, rounds its
    inputs to bf16 from then on, and no longer passes any gradient back.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_base(config: ModelConfig, *, train_all: bool = False) -> Any:
    """The base model on its device, frozen unless `train_all`."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    source = find_source(config.model)
    dtype = pick_dtype(config, train_all=train_all)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    remote = {"trust_remote_code": config.trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(source.base, **remote)
        own_dropouts = dropouts(settings.to_dict())
        model = AutoModelForCausalLM.from_pretrained(
            source.base,
            config=without_dropout(settings),
            dtype=dtype,
            attn_implementation=pick_attention(config, dtype),
            device_map={"": pick_device()},
            quantization_config=quantization if config.load_in_4bit else None,
            **remote,
        )
    except Exception as error:  # the loaders raise whatever their parsers raise
        if is_out_of_memory(error):  # the command line has more to say about it
            raise
        raise OnecardError(f"model: cannot load '{source.base}': {reason(error)}") from error
    model.dropouts = own_dropouts  # for `save_model`
    if config.attn_implementation == "auto":
        use_own_attention(model)
    return keep_differentiable(model).requires_grad_(train_all)
