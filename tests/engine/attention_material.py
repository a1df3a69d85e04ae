"""Small random models of many kinds, pairs that share prompts, and the judge: transformers' own eager attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onecard.data.batches import PreferencePair, TokenBatch, TokenSequence, pack_pairs, to_device
from onecard.models.attention import use_onecard_attention
from onecard.models.roles import Roles

PROMPT = tuple(range(20, 60))  # longer than every window below
LLAMA = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
OLDER = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**LLAMA, "head_dim": 16, "sliding_window": 7, "attn_logit_softcapping": 5.0,
                                "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA, "head_dim": 16, "sliding_window": 7}),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 6}),
    "gpt2": ("GPT2Config", {"vocab_size": 200, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": ("OPTConfig", {**OLDER, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi": ("PhiConfig", {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}),
    "gpt_neox": ("GPTNeoXConfig", {**OLDER, "intermediate_size": 96}),
    "bloom": ("BloomConfig", {"vocab_size": 200, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**LLAMA, "num_experts": 4, "moe_intermediate_size": 32,
                                     "shared_expert_intermediate_size": 32, "use_sliding_window": True,
                                     "sliding_window": 6, "max_window_layers": 3}),
}  # fmt: skip


def random_model(name: str, attention: str = "eager", **settings: Any) -> Any:
    """Weights large enough that a token that sees too much, or too little, changes the result."""
    import transformers

    kind, own = CONFIGS[name]
    config = getattr(transformers, kind)(**{**own, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def own_roles(model: Any, layout: str = "packed") -> Roles:
    """The model as `load_base` and `load_roles` make it ready."""
    use_onecard_attention(model)
    return Roles(model, ("policy",), {"policy": None}, layout)


def answer(prompt: Sequence[int], response: Sequence[int]) -> TokenSequence:
    return TokenSequence((*prompt, *response), (False,) * len(prompt) + (True,) * len(response))


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> PreferencePair:
    return PreferencePair(answer(prompt, chosen), answer(prompt, rejected))


PAIRS = [
    pair(PROMPT, [5, 6, 7], [8, 9]),
    pair(PROMPT[:17], [5, 6, 7], [8, 9, 11, 12]),  # the same prompt cut shorter: a leak would be quiet elsewhere
    pair(PROMPT[:3], [5, 6, 7], [8, 9]),  # too short a prompt to be shared
    pair(PROMPT[5:29], [13], [14, 15, 16, 17, 18, 19, 4, 3]),
]


def logprobs(roles: Roles, layout: str, *, share_prompts: bool = False) -> Tensor:
    """Of the response tokens of `PAIRS`, in the order of the record."""
    roles.layout = layout
    batch = to_device(pack_pairs(PAIRS, share_prompts=share_prompts).sequences, roles.device)
    assert (batch.shared is not None) == share_prompts
    return roles.logprobs(batch, batch.targets)


def judged(model: Any) -> Tensor:
    """The same by the model's own forward pass, one sequence after another."""
    sequences = [item.chosen for item in PAIRS] + [item.rejected for item in PAIRS]
    found = []
    for sequence in sequences:
        ids = torch.tensor([sequence.tokens], device=model.device)
        scores = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        own = scores.gather(1, ids[0, 1:, None]).squeeze(1)
        found.append(own[torch.tensor(sequence.response_mask[1:], device=model.device)])
    return torch.cat(found)


def gradient(model: Any, values: Tensor) -> Tensor:
    """Of a loss in which every token has a slope of its own, flat, fp32."""
    model.zero_grad()
    values.square().sum().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative, in norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def hidden(roles: Roles, batch: TokenBatch) -> Tensor:
    """Of every row."""
    with torch.no_grad():
        return roles.hidden(batch, torch.arange(batch.num_tokens))
