"""Load the tokenizer and the base model of a hub name or folder. Failures raise a one-line `OnecardError`."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.config import ModelConfig
from onecard.models.attention import use_onecard_attention
from onecard.models.folders import TRAINED, holds_weights, weights_folder
from onecard.models.four_bit import check_quantized, dequantize_in_forward, nf4_settings, quantizing_experts
from onecard.models.trunk import context_of
from onecard.utils.errors import OnecardError, is_out_of_memory, reason

# bitsandbytes warns on CPU that an optional faster kernel is not installed; its fallback gives the same result.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


MODELING_LOGGER = logging.getLogger("transformers.modeling_utils")


class LoadReport(logging.Filter):
    """Hides transformers' log message on weights that do not match the model; `check_weights` raises for them.

    `unconverted`: names of the weights that the last load could not convert from those in the file, such as stacked
    experts of which one is missing. transformers reports them only in this message.
    """

    unconverted: tuple[str, ...] = ()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context of a load. The message is read at every logging level."""
        self.unconverted, level = (), MODELING_LOGGER.level
        MODELING_LOGGER.setLevel(logging.WARNING)
        try:
            yield
        finally:
            MODELING_LOGGER.setLevel(level)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        self.unconverted = tuple(re.findall(r"^(.+?)\s*\|[^|\n]*CONVERSION", message, re.MULTILINE))
        return False


load_report = LoadReport()
MODELING_LOGGER.addFilter(load_report)
# Endings of architecture names that are not causal language models -> what such a model does, for the error message
NON_CAUSAL_MODELS = {
    "ForSequenceClassification": "which classifies texts",
    "ForTokenClassification": "which classifies tokens",
    "ForQuestionAnswering": "which marks answers in texts",
    "ForMultipleChoice": "which chooses among texts",
    "ForMaskedLM": "which fills gaps in texts",
    "ForNextSentencePrediction": "which compares texts",
}
NUM_LISTED = 3  # number of weights named in an error message
FULL_PRECISION = "full_precision"  # attribute of a 16-bit parameter: the float32 tensor that it was rounded from


@dataclass(frozen=True)
class Source:
    """The origin of weights. `base`: hub name or model folder; `adapter`: the adapter folder on it, or None."""

    base: str
    adapter: Path | None = None


def find_source(model: str) -> Source:
    """The source that `model` names: a hub name, a model folder, an adapter folder or a run folder."""
    if not model:
        raise OnecardError("--model is missing: give a Hugging Face name or a folder.")
    path = weights_folder(Path(model))
    if (path / "adapter_config.json").is_file():
        base = base_of_adapter(path)
        # PEFT would look up a folder without these files on the hub.
        if not any((path / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
            raise OnecardError(f"model: adapter {path} has no adapter_model.safetensors.")
        return Source(base=find_source(base).base, adapter=path)
    if path.is_dir():
        if not holds_weights(path):
            unfinished = (path / "config.yaml").is_file()
            hint = f", nor {' or '.join(TRAINED)}, which a run writes at its end" if unfinished else ""
            raise OnecardError(f"model: folder {model} has neither config.json nor adapter_config.json{hint}.")
        # An absolute path, so that an adapter trained on it finds its base from every working directory.
        return Source(base=os.path.abspath(path))
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise OnecardError(f"model: no folder {model}; expected a model folder or a Hugging Face name.")
    return Source(base=model)


def find_source_of(model: str, setting: str) -> Source:
    """`find_source` for a setting other than `model`, which error messages then name."""
    try:
        return find_source(model)
    except OnecardError as error:
        raise OnecardError(f"{setting}: {str(error).removeprefix('model: ')}") from error


def base_of_adapter(path: Path) -> str:
    """The base model that an adapter folder names. Raises if that is an adapter too, which would be ignored."""
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
    """The tokenizer in the adapter folder if there is one, else that of the base.

    Its attribute `generation_eos` has the EOS ids of the model's generation config.
    """
    from transformers import AutoTokenizer

    source = find_source(config.model)
    in_adapter = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    name = str(source.adapter) if in_adapter else source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers' loaders may raise any exception
        raise OnecardError(f"model: cannot load the tokenizer of '{name}': {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise OnecardError(f"model: the tokenizer of '{name}' has no EOS token, so responses could not end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is identified by masks, not by ids
    tokenizer.generation_eos = generation_eos(source.base, trust_remote_code=config.trust_remote_code)
    return tokenizer


def generation_eos(base: str, *, trust_remote_code: bool) -> frozenset[int]:
    """The EOS ids of the base's generation config, or else of its config, as in transformers' `generate`."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(base)
    except Exception:  # the base has no generation_config.json
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).get_text_config()
        except Exception as error:
            raise OnecardError(f"model: cannot load '{base}': {reason(error)}") from error
    ids = getattr(config, "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def context_length(config: ModelConfig) -> int | None:
    """The base's context length in tokens; None if its config does not give it."""
    from transformers import AutoConfig

    name = find_source(config.model).base
    try:
        settings = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise OnecardError(f"model: cannot load '{name}': {reason(error)}") from error
    return context_of(settings.get_text_config())


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(config: ModelConfig, *, train_all: bool) -> torch.dtype:
    """The dtype of the weights. `auto`: 16 bit for a frozen base on a GPU; float32 on CPU and for trained weights,
    where 16 bit would round small updates to zero.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if train_all or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def pick_attention(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """The attention implementation. `auto`: flash-attn where it runs; else None, transformers' default (SDPA if the
    model supports it).
    """
    if config.attn_implementation != "auto":
        return config.attn_implementation
    new_enough = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    can_flash = new_enough and dtype != torch.float32 and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if can_flash else None


# (model type, setting) pairs that `without_dropout` keeps, because evaluation mode reads them too: PhiMoE's routing
# depends on its jitter value. The startup check detects the noise.
KEPT_NOISE = {("phimoe", "router_jitter_noise")}


def is_dropout(name: object, value: object) -> bool:
    """Whether a config entry makes results in training mode differ from those in evaluation mode.

    These are dropout, skipped layers, router jitter, and RWKV's `rescale_every`: in evaluation mode it divides the
    base's weights in place, but not the adapters'.
    """
    noise = isinstance(value, float) and any(word in str(name) for word in ("drop", "jitter"))
    return noise or name == "rescale_every"


def without_dropout(model_config: Any) -> Any:
    """Set every `is_dropout` entry of a config to 0, in place: they would make old and new log-probs differ."""
    from transformers import PretrainedConfig

    for name, value in list(vars(model_config).items()):
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif is_dropout(name, value) and (getattr(model_config, "model_type", ""), name) not in KEPT_NOISE:
            setattr(model_config, name, type(value)(0))
    return model_config


def dropouts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that `without_dropout` sets to 0, including nested ones.

    >>> dropouts({"hidden_size": 8, "text_config": {"attention_dropout": 0.1}})
    {'text_config': {'attention_dropout': 0.1}}
    """
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= {name: inner} if (inner := dropouts(value)) else {}
        elif is_dropout(name, value):
            result[name] = value
    return result


def save_model(model: Any, folder: Path) -> None:
    """Write a Hugging Face model folder. Its config has the dropout of the original config again."""
    model.save_pretrained(str(folder))
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    restore_settings(settings, getattr(model, "dropouts", {}))
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def restore_settings(settings: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Overwrite the entries of `settings` that `values` has too, including nested ones."""
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(settings.get(name), dict):
            restore_settings(settings[name], value)
        elif name in settings:
            settings[name] = value


def disable_cpu_repacking(model: Any) -> Any:
    """Disable the inference-only weight layout of bitsandbytes on CPU. Returns the model.

    On a CPU with AVX512-BF16, a 4-bit layer that runs once in evaluation mode repacks its weights permanently. From
    then on it rounds its inputs to bf16 and returns no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def model_class(settings: Any) -> Any:
    """The transformers auto class for a config: image-text-to-text if its checkpoint is such a model, else causal LM.

    A text-only class loads some image-text-to-text models too, but the adapters and merged models that it writes would
    not load as the model of the checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mapped = AutoModelForImageTextToText._model_mapping
    reads_images = type(settings) in mapped and mapped[type(settings)].__name__ in (settings.architectures or [])
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def check_causal_lm(settings: Any, where: str) -> None:
    """Raise if a config is not that of a causal LM. transformers may load some of its weights into one."""
    for name in settings.architectures or []:
        for ending, purpose in NON_CAUSAL_MODELS.items():
            if name.endswith(ending):
                raise OnecardError(f"{where} is a {name}, {purpose}; expected a causal language model.")
    if getattr(settings, "is_encoder_decoder", False):
        raise OnecardError(f"{where} is an encoder with a decoder; expected a causal language model.")


def join_names(names: Sequence[str]) -> str:
    """Join the first three names, and count the others.

    >>> join_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(names[:NUM_LISTED])
    return f"{shown} and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else shown


def check_weights(model: Any, info: Mapping[str, Any], where: str) -> None:
    """Raise unless names and shapes in the files are exactly the model's. `info`: transformers' loading info.

    transformers initializes missing weights at random. Unexpected buffers that the model computes itself are ignored.
    """
    buffers = [name for name, _ in model.named_buffers()]
    known = {name for name, _ in model.named_parameters()}
    missing = sorted(info["missing_keys"])
    unexpected = sorted(
        key
        for key in info["unexpected_keys"]
        if not any(name.endswith(key) for name in buffers) and not is_old_buffer(key, known, info["unexpected_keys"])
    )
    shapes = sorted(info["mismatched_keys"])
    if shapes:
        name, stored, expected = shapes[0]
        raise OnecardError(f"{where}: its {name} is {list(stored)}, expected {list(expected)} by its config.")
    if missing or unexpected:
        parts = [f"has no weights for {join_names(missing)}"] if missing else []
        parts += [f"has weights that its config has no place for: {join_names(unexpected)}"] if unexpected else []
        raise OnecardError(f"{where} {', and '.join(parts)}.")


@torch.no_grad()
def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise if a weight is NaN or infinite. Of a 4-bit weight, the scales are checked."""
    states = {name: tensor.quant_state for name, tensor in tensors.items() if hasattr(tensor, "quant_state")}
    scales = {name: state.offset if state.nested else state.absmax for name, state in states.items()}
    checked = {**tensors, **scales}
    floating = {name: values for name, values in checked.items() if values.is_floating_point() and values.itemsize > 1}
    if not floating:
        return
    extremes = torch.stack([extreme.float() for values in floating.values() for extreme in torch.aminmax(values)])
    finite = extremes.isfinite().view(-1, 2).all(1).tolist()
    wrong = [name for name, is_finite in zip(floating, finite, strict=True) if not is_finite]
    if wrong:
        raise OnecardError(f"{where} has weights that are NaN or infinite: {join_names(wrong)}.")


# Endings of buffers in files of earlier transformers versions: masks, rotary frequencies, OPT's version.
OLD_BUFFERS = ("masked_bias", "causal_mask", "inv_freq", "decoder.version")


def is_old_buffer(key: str, known: Collection[str], unexpected: Collection[str]) -> bool:
    """Whether an unexpected weight is a buffer of an earlier transformers version, which is now computed.

    The `bias` of an attention module without a `weight` is its causal mask.
    """
    weight = f"{key.removesuffix('.bias')}.weight"
    is_mask = key.endswith((".attn.bias", ".attn.attention.bias"))
    return key.endswith(OLD_BUFFERS) or (is_mask and not any(name.endswith(weight) for name in (*known, *unexpected)))


def keep_full_precision(model: Any, base: str, settings: Any, remote: Mapping[str, Any]) -> None:
    """Attach the float32 values of the file to each 16-bit parameter, for the optimizer's master weights."""
    if getattr(settings, "dtype", None) not in (None, torch.float32):
        return
    full = dict(model_class(settings).from_pretrained(base, dtype="auto", **remote).named_parameters())
    for name, parameter in model.named_parameters():
        if full[name].dtype == torch.float32 != parameter.dtype:
            setattr(parameter, FULL_PRECISION, full[name].detach())


def load_base(config: ModelConfig, *, train_all: bool = False) -> Any:
    """The base model on its device, with dropout 0, frozen unless `train_all`. Errors raise `OnecardError`."""
    from transformers import AutoConfig

    base = find_source(config.model).base
    where = f"model: '{base}'"
    dtype = pick_dtype(config, train_all=train_all)
    remote = {"trust_remote_code": config.trust_remote_code}
    load_report.unconverted = ()
    try:
        settings = AutoConfig.from_pretrained(base, **remote)
        check_causal_lm(settings, where)
        original_dropouts = dropouts(settings.to_dict())
        with quantizing_experts(config.load_in_4bit) as faults, load_report.recording():
            model, info = model_class(settings).from_pretrained(
                base,
                config=without_dropout(settings),
                dtype=dtype,
                attn_implementation=pick_attention(config, dtype),
                device_map={"": pick_device()},
                quantization_config=nf4_settings(dtype) if config.load_in_4bit else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_weights` reports them
                **remote,
            )
    except OnecardError:
        raise
    except Exception as error:  # transformers' loaders may raise any exception
        if is_out_of_memory(error):  # the command line adds advice
            raise
        if load_report.unconverted:
            names = join_names(load_report.unconverted)
            raise OnecardError(f"{where} lacks parts of {names}, or their shapes differ.") from error
        raise OnecardError(f"model: cannot load '{base}': {reason(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has loaded an adapter and its base
        raise OnecardError(f"{where} is an adapter on the hub; download it (`hf download`) and give its folder.")
    check_weights(model, info, where)
    check_finite(dict(model.named_parameters()), where)
    if faults:
        raise OnecardError(f"{where}: {faults[0]}.")
    if config.load_in_4bit:
        check_quantized(model)
        dequantize_in_forward(model)
    if train_all and getattr(model, "quantization_method", None) is not None:
        raise OnecardError(
            f"use_peft: '{base}' is stored quantized, so its weights cannot be trained; leave --no_use_peft out."
        )
    model.dropouts = original_dropouts  # for `save_model`
    if train_all and dtype.itemsize < 4:
        keep_full_precision(model, base, settings, remote)
    if config.attn_implementation == "auto":
        use_onecard_attention(model)
    return disable_cpu_repacking(model).requires_grad_(train_all)
