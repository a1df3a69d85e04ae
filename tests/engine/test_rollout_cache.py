"""How many prompts are sampled together: what a cache takes, counted on real ones, and the budget for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from onecard.algorithms.ppo.sampling import make_sampler
from onecard.config import PPOConfig
from onecard.models.cache import cache_bytes
from onecard.rollout import CachedBatch, Sampling, sampling_budget
from tests.engine.rollout_material import LoadedPolicy, recorded_shapes

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "as many key heads as heads": LlamaConfig(**SMALL, num_key_value_heads=4),
    "grouped": LlamaConfig(**SMALL, num_key_value_heads=2),
    "one": LlamaConfig(**SMALL, num_key_value_heads=1),
    "heads of another size": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=24),
    "names of its own": GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "a window in every layer": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16),
    "a window in every other layer": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, sliding_window=16),
}


def held(cache: DynamicCache) -> int:
    """Bytes of the memory behind a cache's keys and values."""
    return sum(each.untyped_storage().nbytes() for layer in cache.layers for each in (layer.keys, layer.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_are_those_of_a_real_cache(name, dtype):
    """After a prompt and one more token, at which a layer with a window drops what lies before it."""
    config = MODELS[name]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for length in (3, 15, 16, 17, 40):
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=torch.ones(5, length - 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
            model(input_ids=torch.ones(5, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        assert held(cache) == 5 * cache_bytes(model, length), length
    if "window" not in name:
        assert cache_bytes(model, 40) == 40 * cache_bytes(model, 1)


def test_bytes_per_token_by_hand():
    """3 layers * keys and values * 2 heads * 8 * 4 bytes."""
    assert cache_bytes(AutoModelForCausalLM.from_config(MODELS["grouped"], dtype=torch.float32), 1) == 3 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 18])
def test_prompts_sampled_together_stay_within_the_budget(monkeypatch, policy: LoadedPolicy, rows):
    """As many rows as the budget has room for, each as long as the longest prompt and its answer."""
    prompts, new = list(policy.prompts * 3), 6
    per_token = cache_bytes(policy.model, 1)
    longest = max(map(len, prompts)) + new
    budget = rows * longest * per_token
    torch.manual_seed(0)
    sizes: list[int] = []
    whole = CachedBatch.logits

    def logits(self: CachedBatch) -> torch.Tensor:
        found = whole(self)
        sizes.append(held(self.cache))
        return found

    monkeypatch.setattr(CachedBatch, "logits", logits)
    with recorded_shapes(policy.model) as shapes:
        policy.sample(Sampling(new), prompts, stop_tokens=(), batch_size=sampling_budget(12, budget))
    incoming = [count for count, columns in shapes if columns > 1]
    assert sum(incoming) == len(prompts)
    assert incoming[0] == min(rows, 12)
    assert max(count for count, _ in shapes) == incoming[0]
    assert max(sizes) <= budget
    assert rows > 12 or max(sizes) > budget - rows * 2 * per_token  # the last token has no keys


def test_one_prompt_is_sampled_whatever_the_budget(policy: LoadedPolicy):
    with recorded_shapes(policy.model) as shapes:
        policy.sample(Sampling(2), policy.prompts, stop_tokens=(), batch_size=sampling_budget(8, 1))
    assert [count for count, columns in shapes if columns > 1] == [1] * len(policy.prompts)


def test_without_a_budget_batches_are_as_they_were(policy: LoadedPolicy):
    torch.manual_seed(4)
    by_count = policy.sample(Sampling(9), batch_size=4).responses
    torch.manual_seed(4)
    assert [one.tokens for one in policy.sample(Sampling(9), batch_size=sampling_budget(4)).responses] == [
        one.tokens for one in by_count
    ]


def test_the_setting_counts_in_gib(policy: LoadedPolicy):
    config = PPOConfig(rollout_cache_gib=0.25, local_rollout_forward_batch_size=7)
    assert make_sampler(config, policy.roles, policy.tokenizer).budget.size.tokens == 2**28
    assert make_sampler(config, policy.roles, policy.tokenizer).budget.size.max_items == 7
    assert make_sampler(PPOConfig(), policy.roles, policy.tokenizer).budget.size.tokens == 0
