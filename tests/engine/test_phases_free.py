"""Nothing of one phase is allocated in the next: weights, optimizer states and small records are all that stays.

What is alive is counted in bytes of storages by a mode that sees each of them born, with weak references.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from onecard.algorithms.dpo import preference_loss
from onecard.algorithms.ppo.experience import compute_model_outputs
from onecard.algorithms.ppo.job import PPO
from onecard.algorithms.ppo.sampling import Sampler
from onecard.algorithms.supervised import Supervised
from onecard.config import DPOConfig, PPOConfig, RewardConfig
from onecard.data import Prompt
from onecard.data.batches import PreferencePair, TokenSequence, pack_pairs
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.rewards.scorer import load_scorer
from onecard.rollout import Sampling
from onecard.training.trainer import Objective, Trainer
from onecard.utils.progress import progress
from tests.grid import grid

SEQUENCES, PROMPT, RESPONSE = 8, 40, 24


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations inside gave and that are still there, the weights' own left out."""

    def __init__(self, roles) -> None:
        super().__init__()
        self.weights = [*roles.parameters(), *roles.buffers()]
        self.born: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.born.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return out

    def storages(self, *kept: object) -> int:
        """Bytes alive, without the storages of the tensors in `kept`."""
        gc.collect()
        self.born = {key: found for key, found in self.born.items() if not found[0].expired()}
        spared = {t.untyped_storage()._cdata for t in tree_iter((kept, self.weights)) if isinstance(t, torch.Tensor)}
        return sum(nbytes for key, (_, nbytes) in self.born.items() if key not in spared)


@contextmanager
def running(config, job, roles):
    """`(trainer, bar)` of a job."""
    trainer = Trainer(config, job, roles.train(), SimpleNamespace(folder=None, checkpoint=None))
    with progress("test", 1) as bar:
        yield trainer, bar


def words(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 290, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


SETTINGS = {
    "plain": {},
    "all levers": {
        "dtype": "bfloat16", "gradient_checkpointing": True, "adapter_dtype": "bfloat16", "optim": "adamw_8bit",
        "micro_batch_tokens": 130, "head_chunk_tokens": 16,
    },
    "NF4, padded": {"load_in_4bit": True, "padding_free": False},
}  # fmt: skip


def ppo_job(model, reward, **settings):
    config = PPOConfig(
        model=str(model), reward_model_path=str(reward), reward_funcs=["fluency"], per_device_train_batch_size=4,
        num_mini_batches=2, num_ppo_epochs=2, response_length=RESPONSE, **settings,
    )  # fmt: skip
    roles, tokenizer = load_ppo_roles(config), load_tokenizer(config)
    prompts = [Prompt("the cat", words(PROMPT, i)) for i in range(SEQUENCES)]
    never = Sampler(tokenizer, Sampling(RESPONSE), frozenset(), 64)  # nothing ends a response: all have RESPONSE tokens
    return config, PPO(config, roles, never, load_scorer(config), prompts, prompts[:4], 9), roles


@pytest.fixture(scope="module")
def reward(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "reward"
    config = RewardConfig(model=str(tiny_model))
    load_roles(config, trained="reward", scalar=True).export("reward", folder, load_tokenizer(config))
    return folder


def states_of(trainer) -> list:
    """What the optimizer keeps."""
    return [list(trainer.optimizer.state.values()), getattr(trainer.optimizer, "masters", [])]


@pytest.mark.parametrize("settings", grid(SETTINGS, ["all levers"]))
def test_after_each_ppo_phase_only_records_are_left(tiny_model, reward, settings):
    """Rollout, judgement, passes, learning, evaluation, by themselves and then as iterations."""
    config, job, roles = ppo_job(tiny_model, reward, **SETTINGS[settings])
    prompts = list(job.prompts)
    with running(config, job, roles) as (trainer, bar), Alive(roles) as alive:
        sampled = job.sampler.sample(roles, prompts, bar)
        number = 4 * SEQUENCES * RESPONSE  # bytes of one float32 for each response token
        assert alive.storages() <= 2 * number  # the log-probs as they were sampled
        judged = job.score(prompts, sampled.episodes)
        assert alive.storages() <= 3 * number
        passes = compute_model_outputs(roles, sampled.episodes, config)
        assert len(passes.logprobs) == SEQUENCES
        left = alive.storages()
        assert left <= 8 * number  # policy's, reference's, critic's
        del sampled, judged, passes
        assert alive.storages() == 0
        trained = sum(p.numel() * p.element_size() for p in roles.trained_parameters().values())
        rows = []
        for step in range(3):
            trainer.step = step
            job.step(trainer, list(range(SEQUENCES)), bar)
            assert all(parameter.grad is None for parameter in roles.parameters())
            rows.append((alive.storages(), alive.storages(states_of(trainer))))
        assert rows[0][0] >= trained / 2  # the optimizer's states are among the storages that are seen
        assert rows[1] == rows[2]
        assert rows[2][1] <= 4096  # states apart: 8-bit AdamW's codes, the schedule's few numbers
        with torch.no_grad():
            found = job.sampler.sample(roles, prompts[:2], bar)
            job.score(prompts[:2], found.episodes)
        del found
        assert alive.storages(states_of(trainer)) == rows[2][1]


@pytest.mark.parametrize("settings", grid(SETTINGS, ["NF4, padded"]))
def test_after_a_dpo_step_nothing_is_left(tiny_model, settings):
    """Gradients are gone, the metrics are numbers; the second step and its evaluation leave as much as the first."""
    config = DPOConfig(model=str(tiny_model), per_device_train_batch_size=4, **SETTINGS[settings])
    roles = load_roles(config, trained="policy", reference=True)
    mask = (False,) * PROMPT + (True,) * RESPONSE
    pairs = [
        PreferencePair(*(TokenSequence(words(PROMPT, i) + words(RESPONSE, 2 * i + side), mask) for side in (0, 1)))
        for i in range(SEQUENCES)
    ]
    objective = Objective(pack_pairs, len, lambda batch, n: (preference_loss(roles, batch, {"beta": 0.1}, n),))
    job = Supervised(config, "dpo", objective, pairs, pairs[:2])
    with running(config, job, roles) as (trainer, bar), Alive(roles) as alive:
        rows = []
        for _ in range(3):
            job.step(trainer, list(range(SEQUENCES)), bar)
            assert all(parameter.grad is None for parameter in roles.parameters())
            rows.append(alive.storages(states_of(trainer)))
            with torch.no_grad():
                job.evaluate(trainer, bar)
            rows.append(alive.storages(states_of(trainer)))
        assert len(set(rows[1:])) == 1
        assert rows[-1] <= 4096
