"""A tiny model for runs that take a second."""

from __future__ import annotations

from pathlib import Path

import torch


def write_tiny_model(folder: Path) -> Path:
    """Write a Hugging Face folder: a random two-layer Llama and a small byte-level BPE tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models.families import write_tokenizer

    write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
