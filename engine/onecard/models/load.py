"""From a name or folder to a tokenizer and a base model, with one clear line where that cannot be done."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.config import ModelConfig
from onecard.models.attention import use_own_attention
from onecard.models.folders import TRAINED, holds_weights, weights_folder
from onecard.models.four_bit import check_packed, nf4_settings, packing_experts, unpack_in_passes
from onecard.models.trunk import context_of
from onecard.utils.errors import OnecardError, is_out_of_memory, reason

# bitsandbytes warns on CPU that an optional faster kernel is not installed; the one it falls back to is exact.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class LoadReport(logging.Filter):
    """Hide transformers' table of weights that do not fit: what it warns of is an error here.

    `unconverted`: its weights that could not be made of the file's, such as stacked experts of which one is missing.
    transformers names them nowhere else.
    """

    unconverted: tuple[str, ...] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        self.unconverted = tuple(re.findall(r"^(.+?)\s*\|[^|\n]*CONVERSION", message, re.MULTILINE))
        return False


load_report = LoadReport()
logging.getLogger("transformers.modeling_utils").addFilter(load_report)
# What else a config may say a model is, and what such a model does
OTHER_MODELS = {
    "ForSequenceClassification": "which classifies texts",
    "ForTokenClassification": "which classifies tokens",
    "ForQuestionAnswering": "which marks answers in texts",
    "ForMultipleChoice": "which chooses among texts",
    "ForMaskedLM": "which fills gaps in texts",
    "ForNextSentencePrediction": "which compares texts",
}
LISTED = 3  # weights in a message
FULL_PRECISION = "full_precision"  # attribute of a 16-bit parameter: the float32 tensor that it was rounded from


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
        base = base_of_adapter(path)
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


def base_of_adapter(path: Path) -> str:
    """The base that an adapter folder names. It is no adapter: what that one learned would be left out."""
    try:
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise OnecardError(f"model: {path}/adapter_config.json does not name its base model.")
    folder = weights_folder(Path(base))
    if folder.resolve() == path.resolve():
        raise OnecardError(f"model: adapter {path} names itself as its base.")
    if (folder / "adapter_config.json").is_file():
        raise OnecardError(
            f"model: adapter {path} names {base} as its base, which is an adapter itself; expected a model (onecard "
            "merge makes one of an adapter)."
        )
    return base


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


# Noise by its name that a model reads in evaluation mode too: PhiMoE routes by it. The startup check finds the noise.
READ_IN_EVALUATION = {("phimoe", "router_jitter_noise")}


def is_dropout(name: object, value: object) -> bool:
    """Whether an entry of a model's config makes training mode another function: dropout, skipped layers, router
    jitter, and RWKV's `rescale_every`, which in evaluation mode divides weights in place and knows no adapters.
    """
    noise = isinstance(value, float) and any(word in str(name) for word in ("drop", "jitter"))
    return noise or name == "rescale_every"


def without_dropout(model_config: Any) -> Any:
    """The same config with every dropout at 0: with dropout, old and new log-probs of one policy would differ."""
    from transformers import PretrainedConfig

    for name, value in list(vars(model_config).items()):
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif is_dropout(name, value) and (getattr(model_config, "model_type", ""), name) not in READ_IN_EVALUATION:
            setattr(model_config, name, type(value)(0))
    return model_config


def dropouts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `without_dropout` sets to 0 among a config's entries, nested ones included.

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


def model_class(settings: Any) -> Any:
    """The auto class for a config: of text and images where its checkpoint is one of these, though some of them a
    text-only class reads too. Read as text-only, its adapter and a merged model would not load as what it is.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mapped = AutoModelForImageTextToText._model_mapping
    reads_images = type(settings) in mapped and mapped[type(settings)].__name__ in (settings.architectures or [])
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def check_writes(settings: Any, where: str) -> None:
    """Refuse a model that its config says is no causal language model, though a part of it could be read as one."""
    for name in settings.architectures or []:
        for ending, does in OTHER_MODELS.items():
            if name.endswith(ending):
                raise OnecardError(f"{where} is a {name}, {does}; expected a causal language model.")
    if getattr(settings, "is_encoder_decoder", False):
        raise OnecardError(f"{where} is an encoder with a decoder; expected a causal language model.")


def listed(names: Sequence[str]) -> str:
    """Up to three of many names.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(names[:LISTED])
    return f"{shown} and {len(names) - LISTED} more" if len(names) > LISTED else shown


def check_weights(model: Any, info: Mapping[str, Any], where: str) -> None:
    """Stop unless the files hold all weights of the model, of its shapes, and no others. `info`: what loading found.

    transformers draws missing weights at random, anew at each load. Of what is left over, buffers that the model
    computes itself do no harm.
    """
    buffers = [name for name, _ in model.named_buffers()]
    known = {name for name, _ in model.named_parameters()}
    missing = sorted(info["missing_keys"])
    left = sorted(
        key
        for key in info["unexpected_keys"]
        if not any(name.endswith(key) for name in buffers) and not is_old_buffer(key, known, info["unexpected_keys"])
    )
    shapes = sorted(info["mismatched_keys"])
    if shapes:
        name, found, expected = shapes[0]
        raise OnecardError(f"{where}: its {name} is {list(found)}, expected {list(expected)} by its config.")
    if missing or left:
        parts = [f"has no weights for {listed(missing)}"] if missing else []
        parts += [f"has weights that its config has no place for: {listed(left)}"] if left else []
        raise OnecardError(f"{where} {', and '.join(parts)}.")


@torch.no_grad()
def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Stop if a weight is NaN or infinite: every number that comes of it would be NaN. In 4 bit its scales are."""
    scales = {name: each.quant_state for name, each in tensors.items() if hasattr(each, "quant_state")}
    found = {**tensors, **{name: state.offset if state.nested else state.absmax for name, state in scales.items()}}
    floating = {name: each for name, each in found.items() if each.is_floating_point() and each.itemsize > 1}
    if not floating:
        return
    ends = torch.stack([end.float() for each in floating.values() for end in torch.aminmax(each)])
    wrong = [name for name, good in zip(floating, ends.isfinite().view(-1, 2).all(1).tolist(), strict=True) if not good]
    if wrong:
        raise OnecardError(f"{where} has weights that are NaN or infinite: {listed(wrong)}.")


# Buffers that models of earlier versions of transformers wrote: masks, rotations, and OPT's version.
OLD_BUFFERS = ("masked_bias", "causal_mask", "inv_freq", "decoder.version")


def is_old_buffer(key: str, known: Collection[str], left: Collection[str]) -> bool:
    """Whether a weight that is left over is a buffer of an earlier version, which the model now computes itself.

    The `bias` of an attention that has no `weight` beside it is its causal mask.
    """
    weight = f"{key.removesuffix('.bias')}.weight"
    is_mask = key.endswith((".attn.bias", ".attn.attention.bias"))
    return key.endswith(OLD_BUFFERS) or (is_mask and not any(name.endswith(weight) for name in (*known, *left)))


def keep_full_precision(model: Any, base: str, settings: Any, remote: Mapping[str, Any]) -> None:
    """Give each 16-bit parameter the float32 values of its file, for the masters that training works on."""
    if getattr(settings, "dtype", None) not in (None, torch.float32):
        return
    full = dict(model_class(settings).from_pretrained(base, dtype="auto", **remote).named_parameters())
    for name, parameter in model.named_parameters():
        if full[name].dtype == torch.float32 != parameter.dtype:
            setattr(parameter, FULL_PRECISION, full[name].detach())


def load_base(config: ModelConfig, *, train_all: bool = False) -> Any:
    """The base model on its device, frozen unless `train_all`."""
    from transformers import AutoConfig

    base = find_source(config.model).base
    where = f"model: '{base}'"
    dtype = pick_dtype(config, train_all=train_all)
    remote = {"trust_remote_code": config.trust_remote_code}
    load_report.unconverted = ()
    try:
        settings = AutoConfig.from_pretrained(base, **remote)
        check_writes(settings, where)
        own_dropouts = dropouts(settings.to_dict())
        with packing_experts(config.load_in_4bit) as faults:
            model, info = model_class(settings).from_pretrained(
                base,
                config=without_dropout(settings),
                dtype=dtype,
                attn_implementation=pick_attention(config, dtype),
                device_map={"": pick_device()},
                quantization_config=nf4_settings(dtype) if config.load_in_4bit else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_weights` names them
                **remote,
            )
    except OnecardError:
        raise
    except Exception as error:  # the loaders raise whatever their parsers raise
        if is_out_of_memory(error):  # the command line has more to say about it
            raise
        if load_report.unconverted:
            names = listed(load_report.unconverted)
            raise OnecardError(f"{where} has not all parts of {names}, or they differ in shape.") from error
        raise OnecardError(f"model: cannot load '{base}': {reason(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers puts it on its base without a word
        raise OnecardError(f"{where} is an adapter on the hub; download it (`hf download`) and give its folder.")
    check_weights(model, info, where)
    check_finite(dict(model.named_parameters()), where)
    if faults:
        raise OnecardError(f"{where}: {faults[0]}.")
    if config.load_in_4bit:
        check_packed(model)
        unpack_in_passes(model)
    if train_all and getattr(model, "quantization_method", None) is not None:
        raise OnecardError(f"use_peft: all weights cannot be trained, for {where} is stored quantized.")
    model.dropouts = own_dropouts  # for `save_model`
    if train_all and dtype.itemsize < 4:
        keep_full_precision(model, base, settings, remote)
    if config.attn_implementation == "auto":
        use_own_attention(model)
    return keep_differentiable(model).requires_grad_(train_all)
