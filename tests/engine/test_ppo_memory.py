"""PPO on one base costs about as much memory as DPO: the same model, the same number of tokens in each pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.measure import peak_bytes
from onecard.algorithms.dpo import preference_loss
from onecard.algorithms.ppo.job import PPO
from onecard.algorithms.ppo.sampling import Sampler
from onecard.algorithms.supervised import Supervised
from onecard.config import DPOConfig, PPOConfig, RewardConfig
from onecard.data import Prompt
from onecard.data.batches import PreferencePair, TokenSequence, pack_pairs
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.rewards.scorer import load_scorer
from onecard.rollout import Sampling, sampling_budget
from onecard.training.trainer import Objective, Trainer
from onecard.utils.progress import progress

SEQUENCES, PROMPT, RESPONSE = 8, 64, 64


def words(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 2000, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def peak_of_a_step(config, job, roles) -> int:
    """One whole step, the optimizer's states being made in it."""
    trainer = Trainer(config, job, roles.train(), SimpleNamespace(folder=None, checkpoint=None))
    with progress("test", 1) as bar:
        return peak_bytes(lambda: job.step(trainer, list(range(SEQUENCES)), bar) and None, roles.device)


def dpo_peak(model, **settings) -> int:
    config = DPOConfig(model=str(model), per_device_train_batch_size=SEQUENCES // 2, **settings)
    roles = load_roles(config, trained="policy", reference=True)
    mask = (False,) * PROMPT + (True,) * RESPONSE
    pairs = [
        PreferencePair(*(TokenSequence(words(PROMPT, i) + words(RESPONSE, 2 * i + side), mask) for side in (0, 1)))
        for i in range(SEQUENCES // 2)
    ]
    objective = Objective(pack_pairs, len, lambda batch, n: (preference_loss(roles, batch, {"beta": 0.1}, n),))
    job = Supervised(config, "dpo", objective, pairs, [])
    job.step = lambda trainer, indices, bar: Supervised.step(job, trainer, indices[: len(pairs)], bar)
    return peak_of_a_step(config, job, roles)


def ppo_peak(model, reward, **settings) -> int:
    config = PPOConfig(
        model=str(model), reward_model_path=str(reward), per_device_train_batch_size=SEQUENCES, num_mini_batches=1,
        num_ppo_epochs=1, response_length=RESPONSE, **settings,
    )  # fmt: skip
    roles, tokenizer = load_ppo_roles(config), load_tokenizer(config)
    prompts = [Prompt("", words(PROMPT, i)) for i in range(SEQUENCES)]
    never = Sampler(
        tokenizer, Sampling(RESPONSE), frozenset(), sampling_budget(64)
    )  # nothing ends a response: all have RESPONSE tokens
    return peak_of_a_step(config, PPO(config, roles, never, load_scorer(config), prompts, [], 1), roles)


@pytest.fixture(scope="module")
def reward(tinystories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "reward"
    config = RewardConfig(model=str(tinystories))
    load_roles(config, trained="reward", scalar=True).export("reward", folder, load_tokenizer(config))
    return folder


@pytest.mark.parametrize(
    ("checkpointing", "padding_free"),
    [
        pytest.param(True, True, id="checkpointed, packed"),
        pytest.param(False, False, id="plain, padded"),
        pytest.param(True, False, id="checkpointed, padded", marks=pytest.mark.grid),
        pytest.param(False, True, id="plain, packed", marks=pytest.mark.grid),
    ],
)
def test_a_ppo_step_takes_at_most_1_3_times_a_dpo_step_s_memory(tinystories, reward, padding_free, checkpointing):
    """A whole iteration, rollout with its cache and all passes included, above the base's own weights."""
    settings = {"padding_free": padding_free, "gradient_checkpointing": checkpointing}
    ppo, dpo = ppo_peak(tinystories, reward, **settings), dpo_peak(tinystories, **settings)
    print(f"PPO {ppo / 2**20:.1f} MiB, DPO {dpo / 2**20:.1f} MiB: {ppo / dpo:.2f}x")
    assert ppo <= 1.3 * dpo
