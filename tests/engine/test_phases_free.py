"""Memory that a phase allocates is freed before the next phase, except weights, optimizer states and small records.

A TorchDispatchMode keeps a weak reference to every storage that an operation returns. The tests sum the bytes of those
that still exist.
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


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of storages that were created inside this context and still exist, without the weights."""

    def __init__(self, roles) -> None:
        super().__init__()
        self.weights = [*roles.parameters(), *roles.buffers()]
        self.created: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.created.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return out

    def nbytes(self, *excluded: object) -> int:
        """Bytes of the storages that still exist, without the weights and the tensors in `excluded`."""
        gc.collect()
        self.created = {key: found for key, found in self.created.items() if not found[0].expired()}
        tensors = [each for each in tree_iter((excluded, self.weights)) if isinstance(each, torch.Tensor)]
        not_counted = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(nbytes for key, (_, nbytes) in self.created.items() if key not in not_counted)


@contextmanager
def running(config, job, roles):
    """A trainer of the job, and a progress bar."""
    trainer = Trainer(config, job, roles.train(), SimpleNamespace(folder=None, checkpoint=None))
    with progress("test", 1) as bar:
        yield trainer, bar


def random_token_ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 290, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


SETTINGS = {
    "plain": {},
    "all memory options": {
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
    prompts = [Prompt("the cat", random_token_ids(PROMPT, i)) for i in range(SEQUENCES)]
    no_stop_tokens = frozenset()  # so every response has RESPONSE tokens
    sampler = Sampler(tokenizer, Sampling(RESPONSE), no_stop_tokens, 64)
    return config, PPO(config, roles, sampler, load_scorer(config), prompts, prompts[:4], 9), roles


@pytest.fixture(scope="module")
def reward(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "reward"
    config = RewardConfig(model=str(tiny_model))
    load_roles(config, trained="reward", scalar=True).export("reward", folder, load_tokenizer(config))
    return folder


def states_of(trainer) -> list:
    """The optimizer's states, and the fp32 copies of 16-bit weights if it has them."""
    return [list(trainer.optimizer.state.values()), getattr(trainer.optimizer, "masters", [])]


@pytest.mark.parametrize("settings", grid(SETTINGS, ["all memory options"]))
def test_after_each_ppo_phase_only_records_are_left(tiny_model, reward, settings):
    """Rollout, rewards and forward passes one by one, then three whole iterations, then an evaluation's phases."""
    config, job, roles = ppo_job(tiny_model, reward, **SETTINGS[settings])
    prompts = list(job.prompts)
    with running(config, job, roles) as (trainer, bar), StorageTracker(roles) as tracker:
        sampled = job.sampler.sample(roles, prompts, bar)
        fp32_per_token = 4 * SEQUENCES * RESPONSE  # bytes of one number for each response token
        assert tracker.nbytes() <= 2 * fp32_per_token  # the log-probs of the sampled tokens
        scores = job.score(prompts, sampled.episodes)
        assert tracker.nbytes() <= 3 * fp32_per_token
        outputs = compute_model_outputs(roles, sampled.episodes, config)
        assert len(outputs.logprobs) == SEQUENCES
        # log-probs of policy and reference, values of the critic, and what is left from above
        assert tracker.nbytes() <= 8 * fp32_per_token
        del sampled, scores, outputs
        assert tracker.nbytes() == 0
        trained_bytes = sum(p.numel() * p.element_size() for p in roles.trained_parameters().values())
        left = []  # after each iteration: bytes with and without the optimizer states
        for step in range(3):
            trainer.step = step
            job.step(trainer, list(range(SEQUENCES)), bar)
            assert all(parameter.grad is None for parameter in roles.parameters())
            left.append((tracker.nbytes(), tracker.nbytes(states_of(trainer))))
        assert left[0][0] >= trained_bytes / 2  # the optimizer states are among the storages that are counted
        assert left[1] == left[2]
        assert left[2][1] <= 4096  # besides optimizer states: the quantization maps of 8-bit AdamW, scheduler scalars
        with torch.no_grad():
            sampled = job.sampler.sample(roles, prompts[:2], bar)
            job.score(prompts[:2], sampled.episodes)
        del sampled
        assert tracker.nbytes(states_of(trainer)) == left[2][1]


@pytest.mark.parametrize("settings", grid(SETTINGS, ["NF4, padded"]))
def test_after_a_dpo_step_nothing_is_left(tiny_model, settings):
    """Gradients are freed, and no later step or evaluation leaves more or fewer bytes than the first evaluation."""
    config = DPOConfig(model=str(tiny_model), per_device_train_batch_size=4, **SETTINGS[settings])
    roles = load_roles(config, trained="policy", reference=True)
    mask = (False,) * PROMPT + (True,) * RESPONSE

    def random_pair(i):
        prompt, answers = random_token_ids(PROMPT, i), [random_token_ids(RESPONSE, seed) for seed in (2 * i, 2 * i + 1)]
        return PreferencePair(*(TokenSequence(prompt + answer, mask) for answer in answers))

    pairs = [random_pair(i) for i in range(SEQUENCES)]
    objective = Objective(pack_pairs, len, lambda batch, n: (preference_loss(roles, batch, {"beta": 0.1}, n),))
    job = Supervised(config, "dpo", objective, pairs, pairs[:2])
    with running(config, job, roles) as (trainer, bar), StorageTracker(roles) as tracker:
        left = []  # bytes besides the optimizer states, after each step and each evaluation
        for _ in range(3):
            job.step(trainer, list(range(SEQUENCES)), bar)
            assert all(parameter.grad is None for parameter in roles.parameters())
            left.append(tracker.nbytes(states_of(trainer)))
            with torch.no_grad():
                job.evaluate(trainer, bar)
            left.append(tracker.nbytes(states_of(trainer)))
        assert len(set(left[1:])) == 1
        assert left[-1] <= 4096
