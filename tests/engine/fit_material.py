"""A plan beside what the same phases really allocate, on this CPU or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import peak_bytes
from onecard.algorithms.ppo.experience import response_logprobs, response_values
from onecard.commands.fit.model import read_config
from onecard.commands.fit.phases import Lengths, training_step
from onecard.commands.fit.plan import MemoryPlan, plan_memory
from onecard.config import DPOConfig, PPOConfig, RewardConfig, TrainConfig
from onecard.data.batches import Episode
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.memory_options import head_chunks
from onecard.models.micro_batching import MicroBatchSize, forward_budget
from onecard.models.roles import Roles
from onecard.rewards.adapter import score_sequences
from onecard.rollout import Sampling, sample_responses, sampling_budget
from onecard.training.optim import clip_grad_norm, make_optimizer
from onecard.training.trainer import accumulate

CPU = torch.device("cpu")
MOST_OFF = 0.05
LENGTHS = Lengths(96, 64)
SHORTER = replace(LENGTHS, prompt=LENGTHS.prompt - 1)  # the plan takes prompts to be of different lengths


def planned(config: TrainConfig, device: torch.device = CPU) -> MemoryPlan:
    return plan_memory(read_config(Path(config.model) / "config.json"), config, LENGTHS, device)


def compared(config: TrainConfig, folder: Path, device: torch.device = CPU) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes that the plan says, bytes that the device says) of each phase, above what was held before it."""
    plan, real = planned(config, device), measured(config, folder)
    phases = {phase.name: phase for phase in plan.phases}
    held = plan.phases[-1].parts
    assert set(phases) - {"load"} == set(real) - {"weights"}
    found = {"weights": held["weights"] + held.get("adapters and heads", 0)}
    found |= {name: phases[name].peak - phases[name].before for name in real if name != "weights"}
    return found, real


def check_close(found: dict[str, int], real: dict[str, int]) -> None:
    """At most 5 % off in each phase; of the optimizer step's few vectors, of the whole that is held then."""
    for name in real:
        print(f"{name}: {real[name] / 2**20:.2f} MiB, planned {found[name] / 2**20:.2f}")
    whole = real["weights"] + real["optimizer step"]
    off = {name: abs(found[name] - real[name]) / (whole if name == "optimizer step" else real[name]) for name in real}
    assert all(error <= MOST_OFF for error in off.values()), off


def real_roles(config: TrainConfig, folder: Path) -> Roles:
    """The weights as the command loads them; a reward adapter is written first where one is asked for."""
    if not isinstance(config, PPOConfig):
        scores, pairs = isinstance(config, RewardConfig), isinstance(config, DPOConfig)
        return load_roles(config, trained="reward" if scores else "policy", reference=pairs, scalar=scores)
    if config.reward_model_path:
        reward = RewardConfig(model=config.model, load_in_4bit=config.load_in_4bit)
        load_roles(reward, trained="reward", scalar=True).export("reward", folder / "reward", load_tokenizer(reward))
        config = replace(config, reward_model_path=str(folder / "reward"))
    return load_ppo_roles(config)


def bytes_of(roles: Roles) -> int:
    """All weights, quantization states included, each storage once."""
    tensors = [*roles.parameters(), *roles.buffers()]
    for state in (getattr(parameter, "quant_state", None) for parameter in roles.parameters()):
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def measured(config: TrainConfig, folder: Path) -> dict[str, int]:
    """What each phase allocates above what was held before it; `weights` are bytes held all the time."""
    with head_chunks(config.head_chunk_tokens):
        return measured_phases(config, real_roles(config, folder).train())


def measured_phases(config: TrainConfig, roles: Roles) -> dict[str, int]:
    """The same of weights that are there."""
    found = {"weights": bytes_of(roles)}

    def take(name: str, work: Callable[[], object]) -> None:
        found[name] = peak_bytes(lambda: work() and None, roles.device)

    if isinstance(config, PPOConfig):
        take_passes(config, roles, take)
    work = training_step(config, roles, LENGTHS)
    padded = roles.layout == "padded"
    cut = MicroBatchSize(config.per_device_train_batch_size, config.micro_batch_tokens, padded=padded)
    examples = [work.example] * work.num_examples
    if padded:
        examples[-1] = training_step(config, roles, SHORTER).example
    take("train", lambda: accumulate(work.objective, examples, cut, roles.device))
    parameters = list(roles.trained_parameters().values())
    optimizer = make_optimizer(config, parameters)
    optimizer.step()  # makes the states
    optimizer.zero_grad()

    def step() -> None:
        for parameter in parameters:  # made here, for a profiler sees no end of what was there before it
            parameter.grad = torch.ones_like(parameter)
        clip_grad_norm(parameters, config.max_grad_norm or math.inf)
        optimizer.step()

    take("optimizer step", step)
    found["optimizer step"] -= sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return found


def take_passes(config: PPOConfig, roles: Roles, take: Callable[[str, Callable[[], object]], None]) -> None:
    """PPO's phases before the training."""
    count = config.episodes_per_step
    prompts = [(5,) * LENGTHS.prompt] * (count - 1) + [(5,) * SHORTER.prompt]
    sampling, rollout = Sampling(config.response_length), sampling_budget(config.local_rollout_forward_batch_size)
    take(
        "rollout",
        lambda: sample_responses(roles, prompts, sampling, stop_tokens=(), batch_size=rollout),
    )
    sequences = [LENGTHS.sequence(1)] * (count - 1) + [SHORTER.sequence(1)]
    episodes = [Episode(sequence, torch.zeros(LENGTHS.response), True) for sequence in sequences]
    budget = forward_budget(config)
    if "reward" in roles.adapters:
        take("reward pass", lambda: score_sequences(roles, sequences, batch_size=budget))
    take("policy pass", lambda: response_logprobs(roles, "policy", episodes, config, budget))
    take("reference pass", lambda: response_logprobs(roles, "reference", episodes, config, budget))
    if "value" in roles.adapters:
        take("value pass", lambda: response_values(roles, episodes, budget))
