"""Chat templates of several families, each with a tokenizer of one id for each byte and its special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onecard.data.batches import TokenSequence
from tests.engine.data_material import CHATML, PLAIN, spelled


@dataclass(frozen=True)
class Family:
    """A template, what the tokenizer and the generation config end with, and the token that must end an answer."""

    template: str
    eos: str
    listed: tuple[str, ...]  # EOS of the generation config
    end: str
    special: tuple[str, ...]
    lead: str = ""  # what an answer begins with, and has before its end, by the template
    trail: str = ""


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (  # behind the last answer it writes EOS too
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
COHERE = (  # a special token before the one that ends an answer
    "{% for m in messages %}<|turn|>{{ m['role'] }}<|text|>{{ m['content'] }}<|end_text|><|end_turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant<|text|>{% endif %}"
)
GENERATION = CHATML.replace("{{ m['content'] }}<|im_end|>", (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
))  # fmt: skip
IM = ("<|im_start|>", "<|im_end|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
PHIS = ("<|user|>", "<|assistant|>", "<|end|>")
COHERES = ("<|turn|>", "<|text|>", "<|end_text|>", "<|end_turn|>")

FAMILIES = {
    "Gemma": Family(GEMMA, "</s>", ("</s>", "<end_of_turn>"), "<end_of_turn>", TURNS),
    "Gemma, not listed": Family(GEMMA, "</s>", (), "<end_of_turn>", TURNS),
    "Phi-3": Family(PHI, "</s>", ("</s>", "<|end|>"), "<|end|>", PHIS),
    "Phi-3, not listed": Family(PHI, "</s>", ("</s>",), "<|end|>", PHIS),
    "ChatML": Family(CHATML, "<|im_end|>", ("<|im_end|>",), "<|im_end|>", IM),
    "ChatML beside another EOS": Family(CHATML, "</s>", ("</s>",), "<|im_end|>", IM),
    "ChatML with a generation block": Family(GENERATION, "</s>", (), "<|im_end|>", IM),
    "Llama 2": Family(LLAMA2, "</s>", ("</s>",), "</s>", (), " ", " "),
    "Cohere": Family(COHERE, "<|end_turn|>", ("<|end_turn|>",), "<|end_turn|>", COHERES, "", "<|end_text|>"),
    "nothing": Family(PLAIN, "</s>", ("</s>",), "</s>", (), "", "\n"),
}


def byte_tokenizer(template: str, eos: str = "</s>", special: Iterable[str] = (), listed: Sequence[str] = ()) -> Any:
    """One id for each byte and one for each special token; `listed` ends responses in the generation config."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, name_or_path="bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
    tokenizer.chat_template = template
    tokenizer.generation_eos = frozenset(tokenizer.convert_tokens_to_ids(token) for token in listed)
    return tokenizer


def of_family(name: str) -> Any:
    family = FAMILIES[name]
    return byte_tokenizer(family.template, family.eos, family.special, family.listed)


def real_template(name: str) -> str:
    """A published template, of those that TRL comes with."""
    found = find_spec("trl")
    path = Path(found.origin).parent / "chat_templates" / f"{name}.jinja" if found and found.origin else None
    if path is None or not path.exists():
        pytest.skip(f"needs the chat template {name} of trl")
    return path.read_text(encoding="utf-8")


def marked(sequence: TokenSequence, tokenizer: Any) -> str:
    """The text of a sequence with its learned parts in [[ ]]."""
    text, before = "", False
    pieces: list[list[int]] = []
    flags: list[bool] = []
    for token, flag in zip(sequence.tokens, sequence.response_mask, strict=True):
        if not flags or flag != before:
            pieces.append([])
            flags.append(flag)
        pieces[-1].append(token)
        before = flag
    for piece, flag in zip(pieces, flags, strict=True):
        text += f"[[{spelled(piece, tokenizer)}]]" if flag else spelled(piece, tokenizer)
    return text
