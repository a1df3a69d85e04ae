"""What sampling works on: rows that leave, other kinds of models, and a model that is left as it was."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.data.batches import TokenSequence, pack
from onecard.models.build import load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Response, Sampling, find_stop_tokens, sample_responses, sampler
from onecard.utils.errors import OnecardError
from tests.engine.rollout_material import (
    TEXTS,
    LoadedPolicy,
    frequent_stop_tokens,
    load,
    one_pass_logprobs,
    recorded_shapes,
)

# --- work


def test_finished_rows_leave_and_a_batch_ends_with_its_last_row(policy, monkeypatch):
    ends = frequent_stop_tokens(policy)

    def passes() -> tuple[list[int], list[Response]]:
        torch.manual_seed(0)
        with recorded_shapes(policy.model) as shapes:
            found = policy.sample(Sampling(80, 0.0), policy.prompts * 2, stop_tokens=ends, batch_size=12).responses
        return [rows for rows, _ in shapes], list(found)

    rows, found = passes()
    longest = max(len(response.tokens) for response in found)
    assert longest < 80
    assert len(rows) == longest  # no pass after the last token
    needed = sum(len(response.tokens) for response in found)
    assert needed <= sum(rows) < 1.25 * needed
    monkeypatch.setattr(sampler, "COMPACTION_SHARE", 2.0)  # nobody leaves
    all_rows, same = passes()
    assert all_rows == [12] * longest
    assert [response.tokens for response in same] == [response.tokens for response in found]
    assert sum(rows) < 0.7 * sum(all_rows)


def test_only_the_last_row_of_a_prompt_gets_logits(policy):
    widths = []
    head = policy.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    policy.sample(Sampling(4))
    handle.remove()
    assert set(widths) == {1}


def test_no_prompts_are_no_responses(policy):
    empty = policy.sample(Sampling(4), [])
    assert empty.responses == ()
    assert empty.tokens_per_second == 0


def test_an_empty_prompt_is_named(policy):
    with pytest.raises(OnecardError, match="prompt 1 has no tokens"):
        policy.sample(Sampling(4), [(5, 6), ()])


def test_tokens_per_second_count_response_tokens(policy):
    found = policy.sample(Sampling(7), stop_tokens=())
    assert found.seconds > 0
    assert found.tokens_per_second == pytest.approx(7 * len(policy.prompts) / found.seconds)


def test_the_bar_moves_with_each_response(policy, monkeypatch):
    """By a clock that ticks when it is looked at: each response adds its 7 tokens and one second, over all batches."""

    class Counting:
        rows: list[dict[str, float]]

        def advance(self, row: dict[str, float]) -> None:
            self.rows.append(row)

    bar = Counting()
    bar.rows = []
    ticks = itertools.count()
    monkeypatch.setattr(sampler.time, "perf_counter", lambda: float(next(ticks)))
    found = policy.sample(Sampling(7), stop_tokens=(), batch_size=4, bar=bar)
    assert len(bar.rows) == len(policy.prompts)
    assert bar.rows == [{"time/tokens_per_second": 7.0}] * len(policy.prompts)
    assert found.seconds == len(policy.prompts) + 1


# --- the model is left as it was


def trained(folder: Path, **settings: Any) -> LoadedPolicy:
    from onecard.config import SFTConfig

    config = SFTConfig(model=str(folder), dtype="float32", **settings)
    roles = load_roles(config, trained="policy", reference=True)
    tokenizer = load_tokenizer(config)
    prompts = tuple(tuple(tokenizer.encode(text)) for text in TEXTS)
    return LoadedPolicy(roles, tokenizer, prompts, find_stop_tokens(roles, tokenizer))


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_policy_in_training_is_sampled_in_evaluation_mode(tinystories, load_in_4bit):
    """With checkpointed layers in training mode there would be no cache; a 4-bit base must pass gradients after it."""
    policy = trained(tinystories, gradient_checkpointing=True, load_in_4bit=load_in_4bit, lora_r=4)
    roles = policy.roles.train()
    lora = [weight for name, weight in roles.trained_parameters().items() if "lora_B" in name]
    torch.manual_seed(0)
    for weight in lora:
        torch.nn.init.normal_(weight, std=0.05)
    odd = next(module for module in roles.modules() if isinstance(module, torch.nn.Embedding))
    odd.eval()
    before = [module.training for module in roles.modules()]
    with recorded_shapes(policy.model) as shapes:
        found = policy.sample(Sampling(12), stop_tokens=frequent_stop_tokens(policy)).responses
    assert [module.training for module in roles.modules()] == before
    assert not odd.training
    assert all(columns == 1 for _, columns in shapes[1:])  # the cache was there
    for prompt, response in zip(policy.prompts, found, strict=True):
        assert not response.logprobs.requires_grad
        torch.testing.assert_close(
            response.logprobs, one_pass_logprobs(policy, prompt, response, 1.0), atol=1e-4, rtol=0
        )  # the adapter's, too
    mask = (False,) * len(policy.prompts[0]) + (True,) * len(found[0].tokens)
    sequence = pack([TokenSequence((*policy.prompts[0], *found[0].tokens), mask)])
    roles.logprobs(sequence, sequence.targets).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in lora)


def test_the_current_role_is_sampled(tinystories):
    policy = trained(tinystories, lora_r=4)
    torch.manual_seed(0)
    for name, weight in policy.roles.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    policy_responses = policy.sample(Sampling(16, 0.0)).responses
    with policy.roles.active("reference"):
        reference = policy.sample(Sampling(16, 0.0)).responses
    base = load(tinystories, dtype="float32").sample(Sampling(16, 0.0)).responses
    assert [response.tokens for response in reference] == [response.tokens for response in base]
    assert [response.tokens for response in policy_responses] != [response.tokens for response in reference]


def test_training_mode_returns_after_an_error_too(policy):
    policy.roles.train()
    try:
        with pytest.raises(IndexError):
            policy.sample(Sampling(4), [(999_999_999,)])
        assert policy.model.training
    finally:
        policy.roles.eval()


# --- other models


def sliding() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6))


def convolving() -> Any:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"]))


def linear() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    layers = ["linear_attention", "full_attention", "linear_attention"]
    shape = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(**SMALL, **shape, **experts, head_dim=16, linear_value_head_dim=8, layer_types=layers)
    )


def alibi() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3))


def absolute() -> Any:
    """Rotary positions hide a shift of a whole row; learned ones do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3))


SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("make", [sliding, convolving, linear, alibi, absolute])
def test_every_kind_of_model_is_sampled_rightly(make):
    """Windows that slide, convolutions, recurrent states; attention that takes no positions, and learned ones."""
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    roles = Roles(model, ("policy",), {"policy": None}, "packed").eval()
    prompts = [torch.randint(1, 60, (length,)).tolist() for length in (3, 9, 5, 12, 4, 7)]
    with recorded_shapes(model) as shapes:
        found = sample_responses(roles, prompts, Sampling(24), stop_tokens=range(5), batch_size=6).responses
    assert len({rows for rows, _ in shapes}) > 2
    for prompt, response in zip(prompts, found, strict=True):
        tokens = torch.tensor([[*prompt, *response.tokens]])
        own = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = own.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)
