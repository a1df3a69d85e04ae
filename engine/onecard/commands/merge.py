"""`onecard merge`: merges an adapter into its base and writes a plain Hugging Face model.

The base is loaded in 16 or 32 bit, not in the 4 bit of training.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onecard.commands.outputs import output_folder
from onecard.config import MergeConfig
from onecard.models.adapters import read_adapter
from onecard.models.load import Source, find_source, load_base, load_tokenizer, save_model
from onecard.models.roles import HEAD_WEIGHTS
from onecard.models.trunk import errors_of
from onecard.models.vocabulary import known_tokens
from onecard.utils.errors import OnecardError, reason
from onecard.utils.files import replace_folder
from onecard.utils.progress import say

PROBE_TOKENS = 32  # length of the sequence on which the merged model is compared with base and adapter
# Largest mean difference of their log-probs in nats: in float32, and in 16 bit, which rounds the merged weights
MAX_DIFFERENCE, MAX_DIFFERENCE_16_BIT = 1e-3, 0.1


def find_mergeable(config: MergeConfig) -> Source:
    """The adapter `model` and its base. Raises `OnecardError` for a full model or a reward adapter."""
    source = find_source(config.model)
    if source.adapter is None:
        raise OnecardError(f"model: {config.model} is a full model, expected an adapter to merge.")
    if (source.adapter / HEAD_WEIGHTS).is_file():
        raise OnecardError(
            f"model: {source.adapter} is a reward adapter. Its scalar head has a bias, which a merged model cannot "
            "store. Give the adapter itself to --reward_model_path."
        )
    return source


def untie_head(model: Any) -> None:
    """Copy the output head's weights if they are tied to the embedding and an adapter is on one of the two.

    Without the copy, merging the adapter into one would change the other.
    """
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    head, embeddings = (getattr(layer, "base_layer", layer) for layer in layers)
    if (head, embeddings) != layers and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def check_not_shared(model: Any, adapter: Path) -> None:
    """Raise if an adapted layer shares its weights with another layer: merging would change both."""
    names_by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    for names in names_by_id.values():
        if len(names) > 1 and any(".base_layer." in name for name in names):
            first, second = (name.replace(".base_layer", "") for name in names[:2])
            raise OnecardError(
                f"model: adapter {adapter} is on {first}, which shares its weights with {second}. Merging would change "
                "both, so this adapter cannot be merged."
            )


def merge_adapter(config: MergeConfig, source: Source) -> Any:
    """The base with the adapter merged into its weights.

    Raises `OnecardError` if the log-probs differ from those of the base with the adapter.
    """
    base = load_base(config)
    if getattr(base, "quantization_method", None) is not None:
        raise OnecardError(
            f"model: the base {source.base} has quantized weights, into which an adapter cannot be merged. Use "
            "the 16-bit model that it was quantized from."
        )
    assert source.adapter is not None
    model = read_adapter(base, source.adapter, "default")
    before = logprobs(model)
    try:
        untie_head(model.get_base_model())
        check_not_shared(model.get_base_model(), source.adapter)
        with warnings.catch_warnings():  # PEFT sets tie_word_embeddings to False and warns
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            model = model.merge_and_unload(safe_merge=True)
    except OnecardError:
        raise
    except Exception as error:  # PEFT raises ValueError, KeyError or RuntimeError
        raise OnecardError(f"model: adapter {source.adapter}: {reason(error)}") from error
    difference = float((logprobs(model) - before).abs().mean())
    if not difference <= (MAX_DIFFERENCE if model.dtype == torch.float32 else MAX_DIFFERENCE_16_BIT):
        raise OnecardError(
            f"model: adapter {source.adapter}: log-probs of the merged model are off by {difference:.2g} nat on "
            "average. An adapter is on a layer that the model does not call, or calls in an unusual way: it may use "
            "the weights directly (Mamba's dt_proj)."
        )
    return model


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    """Log-probs of all tokens at each position of a fixed sequence, fp32 [PROBE_TOKENS, V]."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = (torch.arange(PROBE_TOKENS, device=model.device) * 7919 + 13)[None] % known_tokens(base)
    with errors_of(model):
        return model.eval()(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)


def run(config: MergeConfig) -> Path:
    """`onecard merge`. Returns the folder of the merged model."""
    config.validate()
    source = find_mergeable(config)
    folder = output_folder(config.output_dir)
    tokenizer = load_tokenizer(config)
    model = merge_adapter(config, source)

    def fill(temporary: Path) -> None:
        save_model(model, temporary)
        tokenizer.save_pretrained(str(temporary))

    replace_folder(folder, fill)
    say(f"merged {source.adapter} into {source.base}, {model.dtype}: {folder}".replace("torch.", ""))
    return folder
