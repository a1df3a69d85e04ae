"""What PPO's settings say together: how many of what, and which contradict each other."""

from __future__ import annotations

import math
from dataclasses import replace

from onecard.algorithms.common import longest_sequence
from onecard.algorithms.ppo.estimators import estimator_of
from onecard.config import PPOConfig
from onecard.models.build import has_critic, reward_adapter
from onecard.utils.errors import OnecardError
from onecard.utils.progress import say


def minibatch_size(config: PPOConfig) -> int:
    """Sequences in one optimizer step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def episodes_per_step(config: PPOConfig) -> int:
    """Responses in one iteration."""
    return config.batch_size or minibatch_size(config) * config.num_mini_batches


def total_steps(config: PPOConfig, num_prompts: int) -> int:
    """Iterations in all."""
    if config.max_steps > 0:
        return config.max_steps
    episodes = config.total_episodes or config.num_train_epochs * num_prompts * config.num_generations
    steps = math.ceil(episodes / episodes_per_step(config))
    if steps == 0:
        raise OnecardError("num_train_epochs: 0 epochs are 0 steps; expected more than 0.")
    return steps


def longest_prompt(config: PPOConfig) -> int:
    """Tokens that are left for a prompt beside the response."""
    limit = longest_sequence(config)
    eos = 1 if config.reward_model_path or config.constraint_model_path else 0  # a cut answer gets one to be judged
    room = limit - config.response_length - eos
    if room < 1:
        raise OnecardError(
            f"response_length: {config.response_length} leaves no room for a prompt in {limit} tokens, the smaller of "
            f"max_length ({config.max_length}) and the model's context."
        )
    return room


def with_passes(config: PPOConfig) -> PPOConfig:
    """The same settings with the passes that the estimator makes, which is said where it is another number."""
    if not estimator_of(config).once or config.num_ppo_epochs == 1:
        return config
    name = config.advantage_estimator
    say(f"num_ppo_epochs: 1 instead of {config.num_ppo_epochs}: {name} passes over an iteration's answers once.")
    return replace(config, num_ppo_epochs=1)


def has_constraint(config: PPOConfig) -> bool:
    """Whether anything gives answers a cost."""
    return bool(config.constraint_model_path or config.constraint_funcs)


def check_settings(config: PPOConfig) -> None:
    """Settings that contradict each other, or PPO itself, each with what would do."""
    for complaints in (of_batches(config), of_the_loss(config), of_the_estimator(config), of_no_use(config)):
        for complaint, holds in complaints.items():
            if holds:
                raise OnecardError(complaint)


def of_batches(config: PPOConfig) -> dict[str, bool]:
    """What does not divide."""
    batch, minibatch, per_prompt = episodes_per_step(config), minibatch_size(config), config.num_generations
    made_of = f"per_device_train_batch_size * gradient_accumulation_steps = {minibatch}"
    return {
        f"batch_size: {batch} is smaller than a minibatch of {made_of}; expected a multiple of it.": minibatch > batch,
        f"batch_size: {batch} is no multiple of a minibatch of {made_of}.": batch % minibatch != 0,
        f"num_generations: {per_prompt} does not divide the {batch} responses of an iteration.": batch % per_prompt
        != 0,
    }


def of_the_loss(config: PPOConfig) -> dict[str, bool]:
    """What is out of its range."""
    batch, adapts = episodes_per_step(config), config.adap_kl_ctrl
    return {
        f"temperature: {config.temperature:g}, expected above 0: PPO learns from answers that are drawn.": (
            config.temperature <= 0
        ),
        f"dual_clip: {config.dual_clip:g}, expected above 1, or 0 for none.": 0 < config.dual_clip <= 1,
        f"cliprange: {config.cliprange:g}, expected above 0 and below 1.": not 0 < config.cliprange < 1,
        f"gamma: {config.gamma:g}, expected 0 to 1.": config.gamma > 1,
        f"lam: {config.lam:g}, expected 0 to 1.": config.lam > 1,
        f"adap_kl_target: {config.adap_kl_target:g}, expected above 0.": adapts and config.adap_kl_target <= 0,
        f"adap_kl_horizon: {config.adap_kl_horizon}, expected at least the {batch} responses of an iteration.": (
            adapts and config.adap_kl_horizon < batch
        ),
        f"kl_coef: {config.kl_coef:g}, expected above 0 with adap_kl_ctrl, which multiplies it.": (
            adapts and config.kl_coef <= 0
        ),
        "normalize_reward: expected --value_init zero with it: the critic would start as the reward model, whose "
        "scores are on another scale.": (
            config.normalize_reward
            and config.value_init == "reward"
            and config.critic == "adapter"
            and has_critic(config)
            and reward_adapter(config) is not None
        ),
    }


def of_the_estimator(config: PPOConfig) -> dict[str, bool]:
    """What the advantage estimator has no use for, or cannot do without."""
    groups, once, critic = estimator_of(config).groups, estimator_of(config).once, has_critic(config)
    given = f"with advantage_estimator {config.advantage_estimator}"
    return {
        f"num_generations: {config.num_generations}, expected at least 2 {given}, which compares them.": (
            groups and config.num_generations < 2
        ),
        f"gamma: {config.gamma:g}, expected 1 {given}, which judges whole answers.": groups and config.gamma != 1,
        f"whiten_rewards: expected off {given}: whitened rewards add up to more in a longer answer.": (
            groups and config.whiten_rewards
        ),
        f"dual_clip: {config.dual_clip:g}, expected 0 {given}, which does not clip.": once and config.dual_clip > 0,
        f"bootstrap_truncated: expected off {given}, which has no critic to go on with.": (
            config.bootstrap_truncated and not critic
        ),
        f"critic: shared, expected adapter (the default) {given}, which has no critic.": (
            config.critic == "shared" and not critic
        ),
    }


def of_no_use(config: PPOConfig) -> dict[str, bool]:
    """What was given, and is not looked at. (`rewards.judge` speaks of a constraint_label without its model.)"""
    name, critic, unset = config.advantage_estimator, has_critic(config), PPOConfig()
    clips, given = not estimator_of(config).once, f"with advantage_estimator {name}"
    table = (  # whether they are used, where they are not, which settings
        (
            has_constraint(config),
            "where there is neither a constraint_model_path nor constraint_funcs",
            ("constraint_mode", "constraint_threshold", "constraint_lambda", "constraint_lambda_lr"),
        ),
        (
            config.constraint_mode == "lagrangian",
            f"with constraint_mode {config.constraint_mode}",
            ("constraint_lambda", "constraint_lambda_lr"),
        ),
        (config.adap_kl_ctrl, "without adap_kl_ctrl", ("adap_kl_target", "adap_kl_horizon")),
        (clips, given, ("cliprange", "cliprange_high")),
        (clips and critic, given, ("cliprange_value",)),
        (critic, given, ("vf_coef", "value_init")),
        (name == "gae", given, ("lam",)),
        (config.critic == "adapter", f"with critic {config.critic}", ("value_init",)),
    )
    return {
        f"{setting}: {getattr(config, setting)} is not used {where}; leave it out.": (
            not used and getattr(config, setting) != getattr(unset, setting)
        )
        for used, where, settings in table
        for setting in settings
    }
