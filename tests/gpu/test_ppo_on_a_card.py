"""PPO on a card: the losses on the device, a whole run with its roles in 16 bit and NF4, and what stays allocated."""

from __future__ import annotations

import json

import pytest
import torch

from onecard.config import PPOConfig
from onecard.models.build import load_ppo_roles
from onecard.models.load import load_tokenizer
from onecard.rollout import Sampling, find_stop_tokens, sample_responses
from onecard_kernels import gae, linear_ppo_loss, masked_whiten, value_loss
from tests.gpu.card import CARD, DEVICE, card_only, sized


def test_losses_and_advantages_are_those_of_the_cpu():
    """fp64 on both, so that only a mistake in devices or masks can make a difference."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape, mask = (6, 40), torch.rand(6, 40, generator=generator) > 0.3
    hidden, weight = normal(*shape, 32), normal(300, 32) / 6
    targets = torch.randint(300, shape, generator=generator)
    old, rewards, values = normal(*shape) * 0.1 - 5.7, normal(*shape), normal(*shape)
    results = []
    for device in ("cpu", DEVICE):
        h, w, y, o, r, v, m = (x.to(device) for x in (hidden, weight, targets, old, rewards, values, mask))
        h.requires_grad_()
        advantages, returns = gae(r, v, m, gamma=0.99)
        loss = linear_ppo_loss(h, w, y, o, masked_whiten(advantages, m), m, entropy_coef=0.01, dual_clip=3.0)
        critic = value_loss(v + 0.3, v, returns, m)
        loss.loss.backward()
        results.append([x.cpu() for x in (loss.loss.detach(), h.grad, critic.loss, *loss.metrics.values())])
    for cpu, card in zip(*results, strict=True):
        torch.testing.assert_close(card, cpu, rtol=1e-9, atol=1e-12)


VARIANTS = {
    "bf16": [],
    "NF4, checkpointing, paged": ["--load_in_4bit", "--gradient_checkpointing", "--optim", "paged_adamw_8bit"],
    "fp32, padded": ["--dtype", "float32", "--no_padding_free"],
    "shared critic": ["--critic", "shared", "--bootstrap_truncated", "--gradient_checkpointing", "--normalize_reward"],
    "rloo": ["--advantage_estimator", "rloo", "--num_generations", 4],
}


# tests/e2e/test_ppo_variants.py has many more on the CPU
DRY = [pytest.param("NF4, checkpointing, paged")]


@pytest.mark.parametrize("variant", sized(list(VARIANTS), DRY))
def test_a_run_from_a_reward_adapter(quick, onecard, tmp_path, tiny_model, pairs, variant):
    """Startup checks pass in every dtype, all numbers are finite, and a resumed run takes its checkpoint."""
    reward = onecard("reward", "--model", tiny_model, "--dataset", pairs, "--output_dir", tmp_path / "reward",
                     "--max_steps", 2)  # fmt: skip
    assert reward.code == 0, reward.err
    arguments = [
        "ppo", "--model", tiny_model, "--dataset", pairs, "--reward_model_path", tmp_path / "reward" / "reward",
        "--output_dir", tmp_path / "run", "--response_length", 12, "--per_device_train_batch_size", 4,
        "--max_steps", 2, "--num_mini_batches", 2, "--save_steps", 1, *VARIANTS[variant],
    ]  # fmt: skip
    result = onecard(*arguments)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(value) < float("inf") for row in rows for value in row.values())
    for row in rows:
        if "loss" in row and CARD:
            assert 0 < max(row["memory/rollout_gib"], row["memory/learn_gib"]) <= row["memory/peak_gib"]
    assert onecard(*arguments, "--resume").code == 0


@card_only("the allocator's own count of bytes")
def test_nothing_of_the_rollout_stays_allocated(tiny_model):
    """The cache and the logits are gone when sampling is over."""
    config = PPOConfig(model=str(tiny_model), dtype="bfloat16")
    roles, tokenizer = load_ppo_roles(config), load_tokenizer(config)
    prompts = [(1, 5 + i, 7) for i in range(32)]

    def sample() -> None:
        sample_responses(roles, prompts, Sampling(64), stop_tokens=find_stop_tokens(roles, tokenizer), batch_size=32)

    sample()
    before = torch.cuda.memory_allocated()
    sample()
    assert torch.cuda.memory_allocated() == before
