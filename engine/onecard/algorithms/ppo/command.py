"""`onecard ppo`: from settings to a trained policy. Nothing is written before all of it is loaded and checked."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path

from onecard.algorithms.common import check_model, finish, load_examples, longest_sequence, weights_digest
from onecard.algorithms.ppo.job import PPO, episodes_per_step, minibatch_size
from onecard.algorithms.ppo.sampling import make_sampler
from onecard.algorithms.ppo.startup import check_start
from onecard.checkpoint import digest
from onecard.config import PPOConfig
from onecard.data import Prompt, prompt_examples
from onecard.errors import OnecardError
from onecard.metrics import say
from onecard.models.build import load_ppo_roles, reward_adapter
from onecard.models.load import find_source, load_tokenizer
from onecard.models.roles import ADAPTER_WEIGHTS, HEAD_WEIGHTS
from onecard.rewards.judge import load_judge
from onecard.runs import open_run, with_folder
from onecard.trainer import train


def check_settings(config: PPOConfig) -> None:
    """Settings that contradict each other, or PPO itself, each with what would do."""
    batch, minibatch, per_prompt = episodes_per_step(config), minibatch_size(config), config.num_generations
    made_of = f"per_device_train_batch_size * gradient_accumulation_steps = {minibatch}"
    complaints = {
        f"batch_size: {batch} is smaller than a minibatch of {made_of}; expected a multiple of it.": minibatch > batch,
        f"batch_size: {batch} is no multiple of a minibatch of {made_of}.": batch % minibatch != 0,
        f"num_generations: {per_prompt} does not divide the {batch} responses of an iteration.": batch % per_prompt
        != 0,
        f"temperature: {config.temperature:g}, expected above 0: PPO learns from answers that are drawn.": (
            config.temperature <= 0
        ),
        f"dual_clip: {config.dual_clip:g}, expected above 1, or 0 for none.": 0 < config.dual_clip <= 1,
        f"cliprange: {config.cliprange:g}, expected above 0 and below 1.": not 0 < config.cliprange < 1,
        f"gamma: {config.gamma:g}, expected 0 to 1.": config.gamma > 1,
        f"lam: {config.lam:g}, expected 0 to 1.": config.lam > 1,
        f"adap_kl_target: {config.adap_kl_target:g}, expected above 0.": (
            config.adap_kl_ctrl and config.adap_kl_target <= 0
        ),
        f"adap_kl_horizon: {config.adap_kl_horizon}, expected at least the {batch} responses of an iteration.": (
            config.adap_kl_ctrl and config.adap_kl_horizon < batch
        ),
        f"kl_coef: {config.kl_coef:g}, expected above 0 with adap_kl_ctrl, which multiplies it.": (
            config.adap_kl_ctrl and config.kl_coef <= 0
        ),
    }
    for complaint, holds in complaints.items():
        if holds:
            raise OnecardError(complaint)


def longest_prompt(config: PPOConfig) -> int:
    """Tokens that are left for a prompt beside the response."""
    limit = longest_sequence(config)
    eos = 1 if config.reward_model_path else 0  # which a cut answer is given for the reward model's reading
    room = limit - config.response_length - eos
    if room < 1:
        raise OnecardError(
            f"response_length: {config.response_length} leaves no room for a prompt in {limit} tokens, the smaller of "
            f"max_length ({config.max_length}) and the model's context."
        )
    return room


def starts_from(config: PPOConfig, role: str) -> str:
    """Where a role's adapter comes from, if it is not new: its rank and layers are then its own, not lora_r's."""
    adapters = {
        "policy": find_source(config.model).adapter,
        "value": reward_adapter(config) if config.value_init == "reward" else None,
    }
    return f", as it is in {adapters[role]}" if adapters[role] else ""


def total_steps(config: PPOConfig, num_prompts: int) -> int:
    """Iterations in all."""
    if config.max_steps > 0:
        return config.max_steps
    episodes = config.total_episodes or config.num_train_epochs * num_prompts * config.num_generations
    steps = math.ceil(episodes / episodes_per_step(config))
    if steps == 0:
        raise OnecardError("num_train_epochs: 0 epochs are 0 steps; expected more than 0.")
    return steps


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes with the prompts' tokens and their other columns, which rewards may look at."""
    state = hashlib.sha256()
    for prompt in prompts:
        # Of what JSON cannot hold (an image, say) only the type counts: its `str` may be another in each process.
        columns = json.dumps(dict(prompt.columns), default=lambda value: type(value).__name__, sort_keys=True)
        state.update(array("q", [len(prompt.tokens), *prompt.tokens]).tobytes() + columns.encode())
    return state.hexdigest()


def identity(config: PPOConfig, training: Sequence[Prompt], heldout: Sequence[Prompt]) -> dict[str, str]:
    """What the run is beyond its settings."""
    reward = reward_adapter(config)
    files = [reward / name for name in (ADAPTER_WEIGHTS, HEAD_WEIGHTS)] if reward else []
    return {
        "command": "ppo",
        "model": weights_digest(config.model),
        "prompts": fingerprint(training),
        "held-out prompts": fingerprint(heldout),
        "reward model": " ".join(digest(file) for file in files if file.is_file()),
    }


def run(config: PPOConfig) -> Path:
    """`onecard ppo`. Returns the folder of the trained policy."""
    config = with_folder(config, "ppo")
    check_settings(config)
    run = open_run(config)
    judge = load_judge(config)
    reward_adapter(config)
    tokenizer = load_tokenizer(config)
    room = longest_prompt(config)
    training, heldout = load_examples(
        config,
        lambda rows: prompt_examples(rows, tokenizer, max_length=room, skip_bad_rows=config.skip_bad_rows),
    )
    roles = load_ppo_roles(config)
    check_model(roles)
    sampler = make_sampler(config, roles, tokenizer)
    if run.checkpoint is None:  # a run that goes on has been checked, and its policy has left the reference
        check_start(roles, sampler, judge, training, heldout, config)
    trained = sum(parameter.numel() for parameter in roles.trained_parameters().values())
    steps = total_steps(config, len(training))
    for role in roles.trained:
        say(f"{role}: an adapter of rank {roles.rank(role)}{starts_from(config, role)}.")
    say(
        f"model: {trained:,} trained parameters on {roles.device}, {roles.layout} batches; "
        f"{steps} iterations of {episodes_per_step(config)} responses."
    )
    job = PPO(config, roles, sampler, judge, training, heldout, steps)
    train(config, job, roles, run, identity(config, training, heldout))
    return finish(roles, tokenizer, run)
