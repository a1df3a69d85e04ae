"""Settings of `onecard ppo`, the sizes derived from them (minibatch, batch, steps), and their validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from onecard.config.base import ReferenceConfig, ScoringConfig, TrainConfig, option, raise_first
from onecard.utils.errors import OnecardError

KLEstimator = Literal["k1", "k2", "k3"]
ValueInit = Literal["reward", "zero"]
Critic = Literal["adapter", "shared"]
Estimator = Literal["gae", "reinforce", "rloo", "grpo", "a2c"]
ConstraintMode = Literal["skip", "lagrangian"]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ReferenceConfig, ScoringConfig, TrainConfig):
    """PPO, RLOO, GRPO, REINFORCE or A2C from `prompt` rows: sample responses, score them, train policy and critic.

    A step is one iteration: batch_size responses are sampled and scored, then trained on for num_ppo_epochs passes.
    """

    INPUTS: ClassVar[tuple[str, ...]] = (
        *TrainConfig.INPUTS, "reward_model_path", "ref_adapter", "constraint_model_path",
    )  # fmt: skip

    normalize_reward: bool = option(
        False, "Shift and scale scores so that the starting policy's answers have mean 0 and standard deviation 1."
    )
    constraint_model_path: str = option("", "Model of each answer's cost; takes the same values as reward_model_path.")
    constraint_label: str = option("", "Label that is the cost of a classifier with several labels.")
    constraint_funcs: list[str] = option([], "Functions of each answer's cost, as in reward_funcs; costs are summed.")
    constraint_threshold: float = option(0.0, "An answer with a higher cost violates the constraint.")
    constraint_mode: ConstraintMode = option(
        "skip", "skip: an answer that violates the constraint gives no gradient. lagrangian: its cost times a "
        "multiplier is subtracted from its score; the multiplier is adapted so that the mean cost nears the threshold.",
    )  # fmt: skip
    constraint_lambda: float = option(1.0, "Multiplier of constraint_mode lagrangian in the first iteration.", least=0)
    constraint_lambda_lr: float = option(0.1, "Learning rate of the multiplier of constraint_mode lagrangian.", least=0)

    total_episodes: int = option(
        0,
        "Responses to sample in all; 0: enough for num_train_epochs passes over the prompts. max_steps overrides both.",
        least=0,
    )
    batch_size: int = option(
        0, "Responses in one iteration; 0: num_mini_batches minibatches of per_device_train_batch_size "
        "* gradient_accumulation_steps.", least=0,
    )  # fmt: skip
    num_mini_batches: int = option(
        4,
        "Minibatches, each an optimizer step, in one pass over an iteration; not used if batch_size is given.",
        least=1,
    )
    num_ppo_epochs: int = option(4, "Passes over an iteration's responses.", least=1)
    num_generations: int = option(1, "Responses to each prompt; batch_size counts all of them.", least=1)
    response_length: int = option(64, "Longest response in tokens.", least=1)
    stop_token: list[str] = option([], "Text that ends a response, besides its end tokens; may be given several times.")
    temperature: float = option(1.0, "Divides the logits in sampling and in all log-probs.", least=0)
    per_device_eval_batch_size: int = option(
        16, "Sequences in one pass without gradients: old and reference log-probs, values, scores.", least=1
    )
    local_rollout_forward_batch_size: int = option(64, "Prompts sampled together, at most.", least=1)
    rollout_cache_gib: float = option(
        0.0, "Limit in GiB for the keys and values of prompts that are sampled together; 0: no limit.", least=0
    )

    kl_coef: float = option(0.05, "Weight of the KL to the reference in each token's reward.", least=0)
    kl_estimator: KLEstimator = option("k1", "Estimator of the KL of a token: k1, k2 or k3 (Schulman).")
    adap_kl_ctrl: bool = option(False, "Adapt kl_coef, so that objective/kl approaches adap_kl_target.")
    adap_kl_target: float = option(6.0, "The KL per response, in nats, that adap_kl_ctrl aims at.", least=0)
    adap_kl_horizon: int = option(10000, "Episodes over which adap_kl_ctrl adapts; smaller is faster.", least=1)
    target_kl: float = option(
        0.0, "End an iteration's passes when a minibatch's policy/approxkl exceeds this; 0: never.", least=0
    )

    advantage_estimator: Estimator = option(
        "gae", "gae and a2c use a critic; reinforce, rloo and grpo do not. rloo and grpo compare num_generations "
        "answers to a prompt. reinforce and a2c pass over an iteration's answers once and do not clip.",
    )  # fmt: skip
    critic: Critic = option(
        "adapter", "adapter: the critic has its own adapter; shared: it is a scalar head on the policy."
    )
    bootstrap_truncated: bool = option(
        False, "Add the critic's value of the state after the last token to the return of a truncated answer."
    )
    gamma: float = option(1.0, "Discount of later rewards, per token.", least=0)
    lam: float = option(0.95, "lambda of GAE: 1: Monte-Carlo returns; 0: one-step TD.", least=0)
    whiten_rewards: bool = option(
        False, "Scale the rewards of an iteration to standard deviation 1, keeping their mean."
    )
    cliprange: float = option(0.2, "The policy's ratio is clipped to 1 - cliprange .. 1 + cliprange.", least=0)
    cliprange_high: float = option(0.0, "Upper clip range (DAPO's clip-higher); 0: the same as cliprange.", least=0)
    dual_clip: float = option(
        0.0, "Limits the loss of tokens with a negative advantage A to dual_clip * |A|; above 1, or 0 for off.", least=0
    )
    cliprange_value: float = option(
        0.2, "The value loss clips values to this distance from the old ones; 0: no clipping.", least=0
    )
    vf_coef: float = option(0.1, "Weight of the value loss.", least=0)
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", least=0)
    value_init: ValueInit = option(
        "reward", "reward: the critic starts as the reward adapter, if there is one; zero: with a head of zeros."
    )

    @property
    def minibatch_size(self) -> int:
        """Responses in one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def episodes_per_step(self) -> int:
        """Responses in one iteration."""
        return self.batch_size or self.minibatch_size * self.num_mini_batches

    def total_steps(self, num_prompts: int) -> int:
        """Number of iterations. Raises `OnecardError` if it is 0."""
        if self.max_steps > 0:
            return self.max_steps
        episodes = self.total_episodes or self.num_train_epochs * num_prompts * self.num_generations
        steps = math.ceil(episodes / self.episodes_per_step)
        if steps == 0:
            raise OnecardError("num_train_epochs: 0 epochs are 0 steps; expected more than 0.")
        return steps

    @property
    def has_critic(self) -> bool:
        """Whether the advantage estimator needs a value function."""
        return self.advantage_estimator in ("gae", "a2c")

    @property
    def has_groups(self) -> bool:
        """Whether the advantage estimator compares several responses to a prompt."""
        return self.advantage_estimator in ("rloo", "grpo")

    @property
    def is_single_pass(self) -> bool:
        """Whether the advantage estimator makes one pass over the responses of an iteration and does not clip."""
        return self.advantage_estimator in ("reinforce", "a2c")

    @property
    def has_constraint(self) -> bool:
        """Whether responses get costs."""
        return bool(self.constraint_model_path or self.constraint_funcs)

    def validate(self) -> None:
        raise_first({
            "use_peft: PPO holds its roles as adapters on one base; leave --no_use_peft out.": not self.use_peft,
        })  # fmt: skip
        super().validate()
        for complaints in (batch_sizes(self), ranges(self), unsupported_settings(self), unused_settings(self)):
            raise_first(complaints)


def batch_sizes(config: PPOConfig) -> dict[str, bool]:
    """Message -> whether it applies, for batch sizes that do not divide each other."""
    batch, minibatch, per_prompt = config.episodes_per_step, config.minibatch_size, config.num_generations
    product = f"a minibatch, per_device_train_batch_size * gradient_accumulation_steps = {minibatch}"
    return {
        f"batch_size: {batch}, expected a multiple of {product}.": batch % minibatch != 0,
        f"num_generations: {per_prompt}, expected a divisor of the {batch} responses of an iteration.": (
            batch % per_prompt != 0
        ),
    }


def ranges(config: PPOConfig) -> dict[str, bool]:
    """Message -> whether it applies, for values out of range."""
    batch, adapts = config.episodes_per_step, config.adap_kl_ctrl
    return {
        f"temperature: {config.temperature:g}, expected above 0: PPO needs sampled answers.": (config.temperature <= 0),
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
    }


def unsupported_settings(config: PPOConfig) -> dict[str, bool]:
    """Message -> whether it applies, for settings that the advantage estimator does not support."""
    groups, single_pass, critic = config.has_groups, config.is_single_pass, config.has_critic
    given = f"with advantage_estimator {config.advantage_estimator}"
    return {
        f"num_generations: {config.num_generations}, expected at least 2 {given}, which compares a prompt's answers.": (
            groups and config.num_generations < 2
        ),
        f"gamma: {config.gamma:g}, expected 1 {given}, which rewards whole answers.": groups and config.gamma != 1,
        f"whiten_rewards: expected off {given}: whitened rewards have a larger sum in a longer answer.": (
            groups and config.whiten_rewards
        ),
        f"dual_clip: {config.dual_clip:g}, expected 0 {given}, which does not clip.": (
            single_pass and config.dual_clip > 0
        ),
        f"bootstrap_truncated: expected off {given}, which has no critic to bootstrap from.": (
            config.bootstrap_truncated and not critic
        ),
        f"critic: shared, expected adapter (the default) {given}, which has no critic.": (
            config.critic == "shared" and not critic
        ),
    }


def unused_settings(config: PPOConfig) -> dict[str, bool]:
    """Message -> whether it applies, for settings without effect. (`rewards.scorer` checks constraint_label.)"""
    name, critic, defaults = config.advantage_estimator, config.has_critic, PPOConfig()
    clips, given = not config.is_single_pass, f"with advantage_estimator {name}"
    table = (  # (whether the settings are used, end of the message, settings)
        (
            config.has_constraint,
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
            not used and getattr(config, setting) != getattr(defaults, setting)
        )
        for used, where, settings in table
        for setting in settings
    }
