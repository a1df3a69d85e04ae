"""`onecard merge`: an adapter and its base as one plain Hugging Face model.

The base is read anew in its own precision, never the 4-bit copy that training held.
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
from onecard.models.load import Source, find_source, load_base, load_tokenizer, reason, save_model
from onecard.models.roles import HEAD_WEIGHTS
from onecard.models.trunk import errors_of
from onecard.models.vocabulary import known_tokens
from onecard.utils.errors import OnecardError
from onecard.utils.files import replace_folder
from onecard.utils.progress import say

PROBE = 32  # tokens of the text that the merged model is compared on
MOST_OFF, MOST_OFF_16_BIT = 1e-3, 0.1  # nat on average, in float32 and where the sum of base and adapter is rounded


def mergeable(config: MergeConfig) -> Source:
    """The adapter and its base, or a line that says why there is nothing to merge."""
    source = find_source(config.model)
    if source.adapter is None:
        raise OnecardError(f"model: {config.model} is a whole model and no adapter, so there is nothing to merge.")
    if (source.adapter / HEAD_WEIGHTS).is_file():
        raise OnecardError(
            f"model: {source.adapter} is a reward adapter: its scalar head has a bias, and a plain model has no place "
            "for one; give the adapter itself to --reward_model_path."
        )
    if config.load_in_4bit:
        raise OnecardError("load_in_4bit: weights in 4 bit cannot take an adapter in; leave it out and give --dtype.")
    return source


def untie(model: Any) -> None:
    """Give the head weights of its own where it shares the embeddings' and an adapter is on one of the two.

    What is added to one must not reach the other.
    """
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    head, embeddings = (getattr(layer, "base_layer", layer) for layer in layers)
    if (head, embeddings) != layers and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def check_apart(model: Any, adapter: Path) -> None:
    """Refuse an adapter on a layer that shares its weights with another: what it adds would reach that one too."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for names in holders.values():
        if len(names) > 1 and any(".base_layer." in name for name in names):
            first, second = (name.replace(".base_layer", "") for name in names[:2])
            raise OnecardError(
                f"model: adapter {adapter} is on {first}, which shares its weights with {second}; a plain model has no "
                "place for two of them, so it cannot be merged."
            )


def merged(config: MergeConfig, source: Source) -> Any:
    """The base with the adapter's weights added to its own."""
    base = load_base(config)
    if getattr(base, "quantization_method", None) is not None:
        raise OnecardError(
            f"model: the base {source.base} is itself stored quantized, and cannot take an adapter in; merge into the "
            "16-bit model that it was made from."
        )
    assert source.adapter is not None
    model = read_adapter(base, source.adapter, "default")
    before = logprobs(model)
    try:
        untie(model.get_base_model())
        check_apart(model.get_base_model(), source.adapter)
        with warnings.catch_warnings():  # PEFT sees that they are two now, and says so in the config and aloud
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            model = model.merge_and_unload(safe_merge=True)
    except OnecardError:
        raise
    except Exception as error:  # PEFT raises ValueError, KeyError or RuntimeError as its parsers do
        raise OnecardError(f"model: adapter {source.adapter}: {reason(error)}") from error
    off = float((logprobs(model) - before).abs().mean())
    if not off <= (MOST_OFF if model.dtype == torch.float32 else MOST_OFF_16_BIT):
        raise OnecardError(
            f"model: adapter {source.adapter}: log-probs of the merged model are off by {off:.2g} nat on average. An "
            "adapter is on a layer whose weights the model uses without calling it (Mamba's dt_proj), or that it calls "
            "in a way of its own."
        )
    return model


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    """Of all tokens behind a few, fp32 [PROBE, V]."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = (torch.arange(PROBE, device=model.device) * 7919 + 13)[None] % known_tokens(whole)
    with errors_of(model):
        return model.eval()(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)


def run(config: MergeConfig) -> Path:
    """`onecard merge`. Returns the folder of the merged model."""
    source = mergeable(config)
    folder = output_folder(config.output_dir)
    tokenizer = load_tokenizer(config)
    model = merged(config, source)

    def fill(temporary: Path) -> None:
        save_model(model, temporary)
        tokenizer.save_pretrained(str(temporary))

    replace_folder(folder, fill)
    say(f"merged {source.adapter} into {source.base}, {model.dtype}: {folder}".replace("torch.", ""))
    return folder
