"""Tiny random causal language models of the families that transformers has, with their symmetries broken.

A family is a `model_type` with the sizes below, as far as its config has settings of these names, and what else makes
it show all of its kinds of layers on short texts: windows, top-k attention and chunks are shorter than a text, contexts
end within one. Weights are drawn large enough that a token that sees too much or too little changes the result, and
norms, biases and scales are moved off the ones and zeros that hide a missing term.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CONTEXT, WINDOW, TOP_K = 96, 7, 8
SIZES: dict[str, Any] = {
    # width and depth
    "vocab_size": 300, "hidden_size": 48, "n_embd": 48, "d_model": 48, "intermediate_size": 80, "ffn_dim": 80,
    "dff": 80, "n_inner": 80, "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3,
    "word_embed_proj_dim": 48,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    # positions
    "max_position_embeddings": CONTEXT, "max_seq_len": CONTEXT, "n_positions": CONTEXT, "n_ctx": CONTEXT,
    "sliding_window": WINDOW, "index_topk": TOP_K, "index_n_heads": 2, "index_head_dim": 16,
    # experts
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16, "mamba_chunk_size": 16}
DELTA = {"layer_types": LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12,
         "linear_value_head_dim": 12}  # fmt: skip
LATENT = {"num_key_value_heads": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
            "original_max_position_embeddings": 32}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
IMAGE, VIDEO = 299, 298  # tokens that stand for pictures; no text has them
IMAGES = {"image_token_id": IMAGE, "video_token_id": VIDEO}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "depth": 2,
          "num_heads": 2, "out_hidden_size": 48, "num_position_embeddings": 16, "image_size": 28, "patch_size": 14,
          "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}  # fmt: skip


PLAIN = """
    apertus arcee bitnet bloom cohere cohere2 cohere2_moe ctrl cwm diffllama doge ernie4_5 ernie4_5_moe exaone4
    falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granitemoe granitemoeshared hunyuan_v1_dense hunyuan_v1_moe hyperclovax jetmoe laguna lfm2 llama llama4_text
    mamba mimo_v2_flash minimax minimax_m2 ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron
    olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe
    recurrent_gemma seed_oss smollm3 starcoder2 vaultgemma xglm biogpt afmoe aria_text bailing_hybrid beam
    deepseek_v4 exaone_moe flint gemma4_unified_text granite_swa granitemoe_swa gpt_neox_japanese hrm_text hy_v3
    hy_v4 inkling2_text inkling_text internlm3 iquestcoder jais2 kolibri1 lfm3 mellum minimax_m3_vl_text ministral
    olmo_hybrid qwen4_exp_text solar_open
"""  # families that need no settings of their own


@dataclass(frozen=True)
class Family:
    """A row of the matrix. `settings` go into the config beside `SIZES`, but for those named in `without`; into that of
    the text decoder, where the model reads pictures too, whose own are `pictures`.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    pictures: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    kind: Family(kind)
    for kind in PLAIN.split()
} | {
    "axk1": Family("axk1", LATENT),
    "axk2": Family("axk2", LATENT),
    "deepseek_v2": Family("deepseek_v2", LATENT),
    "deepseek_v3": Family("deepseek_v3", LATENT),
    "deepseek_v32": Family("deepseek_v32", LATENT),
    "glm_moe_dsa": Family("glm_moe_dsa", LATENT),
    "glm4_moe_lite": Family("glm4_moe_lite", LATENT),
    "minicpm3": Family("minicpm3", LATENT),
    "youtu": Family("youtu", LATENT),
    "bamba": Family("bamba", {**MAMBA_2, "attn_layer_indices": [1]}),
    "falcon": Family("falcon", without=("head_dim",)),
    "falcon_h1": Family("falcon_h1", {**MAMBA_2, "mamba_d_ssm": 96}),
    "granitemoehybrid": Family("granitemoehybrid", {**MAMBA_2, "layer_types": LINEAR, "shared_intermediate_size": 48}),
    "jamba": Family("jamba", {"attn_layer_offset": 1, "attn_layer_period": 3, "mamba_d_state": 8,
                              "use_mamba_kernels": False}),
    "kimi_linear": Family("kimi_linear", {"layer_types": LINEAR, "linear_num_heads": 4, "linear_head_dim": 12,
                                          "num_key_value_heads": 4}),
    "nemotron_h": Family("nemotron_h", {"mamba_num_heads": 8, "mamba_head_dim": 12, "ssm_state_size": 16,
                                        "chunk_size": 16, "n_groups": 1, "layers_block_type": ["mamba", "attention",
                                                                                               "mamba"]}),
    "mamba2": Family("mamba2", {"num_heads": 8, "head_dim": 12, "state_size": 16, "n_groups": 1, "chunk_size": 16}),
    "rwkv": Family("rwkv", {"rescale_every": 1}),
    "qwen3_next": Family("qwen3_next", DELTA),
    "qwen3_5_text": Family("qwen3_5_text", DELTA),
    "qwen3_5_moe_text": Family("qwen3_5_moe_text", DELTA),
    "xlstm": Family("xlstm", {"num_heads": 4, "hidden_size": 64, "qk_dim_factor": 1.0}, ("v_head_dim", "head_dim")),
    "zamba2": Family("zamba2", {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4,
                                "n_mamba_heads": 8, "mamba_headdim": 12, "num_key_value_heads": 4, "mamba_d_state": 16,
                                "chunk_size": 16, "adapter_rank": 4, "attention_head_dim": 24}),
    "zamba": Family("zamba", {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4,
                              "attention_head_dim": 24, "mamba_d_state": 8, "n_mamba_heads": 2,
                              "use_mamba_kernels": False}),
    "zaya": Family("zaya", {"num_experts_per_tok": 1}),
    "codegen": Family("codegen", {"n_embd": 64, "rotary_dim": 8}),
    "gptj": Family("gptj", {"n_embd": 64, "rotary_dim": 8}),
    "gpt_neo": Family("gpt_neo", {"attention_types": [[["global", "local"], 1], [["global"], 1]],
                                  "window_size": WINDOW, "num_heads": 4}),
    "helium": Family("helium", {"head_dim": 12, "num_key_value_heads": 4}),
    "stablelm": Family("stablelm", {"hidden_size": 64, "num_key_value_heads": 4}),
    "dots1": Family("dots1", {"n_shared_experts": 1, "layer_types": SLIDING}),
    "lfm2_moe": Family("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"]}),
    "gemma3n_text": Family("gemma3n_text", {
        "num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "laurel_rank": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0], "intermediate_size": [80] * 3}),
    "gemma4_text": Family("gemma4_text", {
        "num_kv_shared_layers": 0, "layer_types": SLIDING, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300, "global_head_dim": 32}),
    "opt, projected": Family("opt", {"word_embed_proj_dim": 32}),
    "phi3, longrope": Family("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "llama, dynamic NTK": Family("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0,
                                                               "factor": 2.0}}),
    # with pictures
    "gemma3": Family("gemma3", pictures={"mm_tokens_per_image": 4}),
    "gemma4": Family("gemma4", {
        "num_kv_shared_layers": 0, "layer_types": SLIDING, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300, "global_head_dim": 32}),
    "glm4v": Family("glm4v", {"rope_parameters": MROPE}, pictures=IMAGES),
    "internvl": Family("internvl", pictures={"image_token_id": IMAGE}),
    "lfm2_vl": Family("lfm2_vl", {"layer_types": ["conv", "full_attention", "conv"]}),
    "llama4": Family("llama4", pictures={"image_token_index": IMAGE}),
    "llava": Family("llava", pictures={"image_token_index": IMAGE}),
    "mistral3": Family("mistral3", pictures={"image_token_id": IMAGE}),
    "mllama": Family("mllama"),
    "paligemma": Family("paligemma"),
    "qwen2_5_vl": Family("qwen2_5_vl", {"rope_parameters": MROPE}, pictures=IMAGES),
    "qwen3_5": Family("qwen3_5", DELTA, pictures=IMAGES),
    "qwen3_5_moe": Family("qwen3_5_moe", DELTA, pictures=IMAGES),
    "qwen3_vl": Family("qwen3_vl", pictures=IMAGES),
    "smolvlm": Family("smolvlm"),
    "llama, head bias": Family("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}  # fmt: skip


def sized(kind: Any, sizes: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The sizes that a config class has settings for."""
    known = inspect.signature(kind.__init__).parameters
    given = {
        name: value for name, value in sizes.items() if name not in without and (hasattr(kind, name) or name in known)
    }
    for alias, name in getattr(kind, "attribute_map", {}).items():
        if name in given:
            given.pop(alias, None)
    return given


def config_of(family: Family) -> Any:
    """A tiny config of a family; of a vision-language model with parts of its own for text and pictures."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[family.kind]
    if not {"text_config", "vision_config"} <= made.sub_configs.keys():
        return made(**{**sized(made, SIZES, family.without), **family.settings})
    usual = made()
    kinds = {
        part: type(getattr(usual, part)) if getattr(usual, part, None) else made.sub_configs[part]
        for part in ("text_config", "vision_config")
    }
    text = {**sized(kinds["text_config"], SIZES, family.without), **family.settings}
    given = {"text_config": text, "vision_config": sized(kinds["vision_config"], VISION)}
    return made(**{part: kinds[part](**each) for part, each in given.items()}, **family.pictures)


@torch.no_grad()
def shake(model: Any) -> None:
    """Draw all weights anew, and move what is 0 or 1 by itself off that."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() <= 1 or name.endswith("norm.weight"):
            parameter.add_(drawn * 0.1)
        else:
            parameter.copy_(drawn * (0.5 if "embed" in name or "lm_head" in name else 0.8 / parameter.shape[-1] ** 0.5))


def auto_class(settings: Any) -> Any:
    """The class that a model of this config is, with its vision tower where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(settings, "vision_config") else AutoModelForCausalLM


def random_model(family: Family) -> Any:
    """A float32 model in evaluation mode, without dropout, which would be refused by no name."""
    torch.manual_seed(0)
    settings = config_of(family)
    for part in (settings, settings.get_text_config()):
        for name in [name for name, value in vars(part).items() if isinstance(value, float) and "drop" in name]:
            setattr(part, name, 0.0)
    model = auto_class(settings).from_config(settings).eval()
    shake(model)
    return model


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of `SIZES["vocab_size"]` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "a good answer", "a bad answer"] * 5, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_model(family: Family, folder: Path) -> None:
    """The model and its tokenizer as a folder."""
    random_model(family).save_pretrained(folder)
    write_tokenizer(folder)
