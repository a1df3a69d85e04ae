"""Synthetic models and pairs: random weights and tokens from a fixed seed. Nothing is downloaded.

A model is a folder with a `config.json` and a tokenizer, but no weights. Where a library would load them, they
are sampled on the device instead. For NF4 each layer is quantized as soon as it is sampled, so loading needs no more
memory than the quantized model and one layer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from onecard.config import Dtype

SEED = 7
END, PAD = 0, 1  # token ids; each answer ends with END
FIRST_WORD = 2
STD = 0.02  # of random weights
MATRIX_DIM = 2  # parameters with fewer dimensions are norm weights (set to 1) and biases (set to 0)


DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Model:
    """A decoder's sizes. Named as in `transformers` configs, without suffixes."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    model_type: str = "llama"
    tied: bool = False  # embeddings and head are one matrix

    @property
    def settings(self) -> dict[str, Any]:
        """The entries of a `config.json`."""
        return {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.model_type]],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "eos_token_id": END,
            "bos_token_id": None,
            "pad_token_id": PAD,
        }


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its two answers, which end with END."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Real tokens: both answers with the prompt, as TRL counts them."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def word(token: int) -> str:
    """The text of a token."""
    return {END: "<end>", PAD: "<pad>"}.get(token, f"w{token}")


def text(tokens: Sequence[int]) -> str:
    """Words with a space before each, so that the texts of a prompt and an answer can be concatenated."""
    return "".join(f" {word(token)}" for token in tokens)


def write_folder(model: Model, folder: Path) -> Path:
    """`config.json` and a tokenizer of whole words; no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word(token): token for token in range(model.vocab)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=word(PAD)))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=word(END), pad_token=word(PAD)).save_pretrained(
        str(folder)
    )
    (folder / "config.json").write_text(json.dumps(model.settings, indent=1) + "\n", encoding="utf-8")
    return folder


def load_word_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. `AutoTokenizer` chooses a class by the `model_type`, which splits words."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def random_pairs(count: int, prompt: int, response: int, vocab: int, *, mixed: bool) -> list[Pair]:
    """Pairs of these lengths, or with each length drawn from half of it to all of it."""
    rng = random.Random(f"{SEED} {count} {prompt} {response} {mixed}")

    def tokens(longest: int) -> tuple[int, ...]:
        length = rng.randint((longest + 1) // 2, longest) if mixed else longest
        return tuple(rng.randrange(FIRST_WORD, vocab) for _ in range(length))

    return [Pair(tokens(prompt), (*tokens(response)[:-1], END), (*tokens(response)[:-1], END)) for _ in range(count)]


@contextmanager
def random_weights() -> Iterator[None]:
    """Context in which `AutoModelForCausalLM.from_pretrained` returns a model with random weights."""
    from transformers import AutoModelForCausalLM

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", random_model):
        yield


def random_model(
    folder: str,
    *,
    config: Any = None,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    device_map: dict[str, Any],
    quantization_config: Any = None,
    output_loading_info: bool = False,
    **_: Any,
) -> Any:
    """A model as `from_pretrained` would give it, with weights N(0, STD) from one seed, sampled matrix by matrix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device(device_map[""])
    settings = AutoConfig.from_pretrained(folder) if config is None else config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attn_implementation)
    if quantization_config is not None:
        mark_quantized(model, quantization_config)
    generator = torch.Generator(device).manual_seed(SEED)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() < MATRIX_DIM:
                value.fill_(0.0 if name == "bias" else 1.0)
            else:
                value.normal_(std=STD, generator=generator)
            setattr(module, name, quantized(module, name, value, device))
    rebuild_rotary_embeddings(model, device)
    model.tie_weights()
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model.eval(), info) if output_loading_info else model.eval()


def quantized(module: nn.Module, name: str, value: torch.Tensor, device: torch.device) -> nn.Parameter:
    """The parameter; the weight of a 4-bit layer is quantized immediately."""
    if name != "weight" or type(module).__name__ != "Linear4bit":
        return nn.Parameter(value)
    from bitsandbytes.nn import Params4bit

    weight: Any = Params4bit(value, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module)
    parameter: nn.Parameter = weight.to(device)
    return parameter


def mark_quantized(model: Any, quantization_config: Any) -> None:
    """Replace all linear layers but the head by 4-bit ones, and set the attributes that PEFT and TRL check."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer

    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    replace_with_bnb_linear(model, modules_to_not_convert=[head], quantization_config=quantization_config)
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    model.quantization_method = quantization_config.quant_method
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = quantization_config


def rebuild_rotary_embeddings(model: Any, device: torch.device) -> None:
    """Rebuild rotary embeddings: their buffers are computed when they are constructed, and were constructed on meta."""
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, type(module)(config=module.config).to(device))
    uncomputed = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not uncomputed, f"buffers that were not computed: {uncomputed}"
