"""Creates a tiny Llama with random weights and a tokenizer, as a Hugging Face model folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onecard.utils.errors import OnecardError
from onecard.utils.files import list_files, replace_folder

VOCABULARY = 1024
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}  # ids 0, 1, 2, 3
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # with the default of 0.02, for wide models, a narrow one learns slowly at first
}


def _tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer trained on `texts`: it encodes any text, and most words of `texts` as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=SHAPE["max_position_embeddings"], **SPECIAL
    )


def make_tiny_model(folder: str | os.PathLike[str], texts: Sequence[str], seed: int) -> Path:
    """Write the model and a tokenizer trained on `texts` into `folder`. The same texts and seed give the same bytes.

    The caller's random state does not change.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config.do_sample = True  # the ids of bos, eos and pad come with the config

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        other = sorted(set(list_files(target)) - set(list_files(temporary)))
        if other:
            raise OnecardError(f"{target / other[0]} is not a file of the tiny model; move it away.")

    target = Path(folder)
    replace_folder(target, write)
    return target
