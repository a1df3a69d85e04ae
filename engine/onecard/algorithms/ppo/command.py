"""`onecard ppo`: settings -> a trained policy. Nothing is written before everything is loaded and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onecard.algorithms.common import (
    describe_adapter,
    effective_max_length,
    export_and_report,
    load_examples,
)
from onecard.algorithms.ppo.job import PPO
from onecard.algorithms.ppo.sampling import make_sampler
from onecard.algorithms.ppo.scores import measure_scale
from onecard.algorithms.ppo.startup import check_start
from onecard.config import PPOConfig
from onecard.data import Prompt, prompt_examples
from onecard.data.templates import template_date
from onecard.models.build import SCORER_SETTINGS, load_ppo_roles, reward_adapter
from onecard.models.load import find_source, load_tokenizer
from onecard.models.memory_options import head_chunks, memory_option_notes
from onecard.models.micro_batching import forward_budget
from onecard.models.roles import Roles
from onecard.models.trunk import rotation_limit, trunk_of
from onecard.models.vocabulary import check_tokens
from onecard.rewards.scorer import load_constraint, load_scorer
from onecard.training import dry_run
from onecard.training.identity import ppo_identity
from onecard.training.run_folder import Run, locked, open_run, with_output_dir
from onecard.training.startup import check_decoding, check_model
from onecard.training.trainer import Trainer
from onecard.utils.errors import OnecardError
from onecard.utils.progress import say


def describe_role(config: PPOConfig, roles: Roles, role: str) -> str:
    """A trained role in words: an adapter, or a head on the policy."""
    if not roles.has_own_weights(role):
        return "a head on the policy"
    adapters = {
        "policy": find_source(config.model).adapter,
        "value": reward_adapter(config) if config.value_init == "reward" else None,
    }
    return describe_adapter(roles, role, adapters[role])


def longest_prompt(config: PPOConfig) -> int:
    """The largest number of prompt tokens that leaves room for a response."""
    limit = effective_max_length(config)
    # a model scores a truncated answer with an EOS appended
    eos = 1 if config.reward_model_path or config.constraint_model_path else 0
    longest = limit - config.response_length - eos
    if longest < 1:
        raise OnecardError(
            f"response_length: {config.response_length} leaves no room for a prompt in {limit} tokens, the smaller of "
            f"max_length ({config.max_length}) and the model's context."
        )
    return longest


def with_single_pass(config: PPOConfig) -> PPOConfig:
    """Set num_ppo_epochs to 1 for an estimator that makes one pass over the answers. Prints a line if it was more."""
    if not config.is_single_pass or config.num_ppo_epochs == 1:
        return config
    epochs, name = config.num_ppo_epochs, config.advantage_estimator
    say(f"num_ppo_epochs: 1 is used instead of {epochs}, because {name} makes one pass over the answers.")
    return replace(config, num_ppo_epochs=1)


def check_value_init(config: PPOConfig) -> None:
    """Refuse normalize_reward with a critic that starts as the reward adapter."""
    copies_reward = config.has_critic and config.critic == "adapter" and config.value_init == "reward"
    if config.normalize_reward and copies_reward and reward_adapter(config) is not None:
        raise OnecardError(
            "normalize_reward: add --value_init zero. The critic would start as the reward model, whose scores are not "
            "normalized."
        )


def check_rope_limit(roles: Roles, prompts: Sequence[Prompt], config: PPOConfig) -> None:
    """Refuse responses that cross the length at which the model changes its RoPE factors.

    Beyond it all positions of a text use other factors, so the log-probs of earlier tokens change too.
    """
    limit = rotation_limit(trunk_of(roles.causal_model()).config)
    crossing = [p for p in prompts if limit and len(p.tokens) <= limit < len(p.tokens) + config.response_length]
    if crossing:
        raise OnecardError(
            f"response_length: a prompt of {len(crossing[0].tokens)} tokens with an answer of {config.response_length} "
            f"crosses {limit} tokens. The model uses other RoPE factors for longer texts, so the log-probs in training "
            f"would not be those of sampling. Keep prompts and answers within {limit} tokens together."
        )


def run(config: PPOConfig) -> Path:
    """`onecard ppo`. Returns the folder of the trained policy."""
    config.validate()
    check_value_init(config)
    config = with_single_pass(with_output_dir(config, "ppo"))
    run = open_run(config)
    with head_chunks(config.head_chunk_tokens), template_date(run.info.date):
        job = prepare(config, run)
        if config.dry_run:
            dry_run.show(config, job.roles, job.sampler.tokenizer, job.prompts[0])
            return run.folder
        with locked(run):
            Trainer(config, job, job.roles, run).train(ppo_identity(config, job.prompts, job.heldout))
            return export_and_report(job.roles, job.sampler.tokenizer, run)


def prepare(config: PPOConfig, run: Run) -> PPO:
    """Load and check everything that a run needs, and return its job."""
    budget = forward_budget(config)
    scorer, constraint = load_scorer(config, budget), load_constraint(config, budget)
    for setting in SCORER_SETTINGS.values():
        reward_adapter(config, setting)  # raises for an adapter that cannot be used
    tokenizer = load_tokenizer(config)
    max_length = longest_prompt(config)
    training, heldout = load_examples(
        config,
        lambda rows: prompt_examples(
            rows,
            tokenizer,
            max_length=max_length,
            truncation_mode=config.truncation_mode,
            skip_bad_rows=config.skip_bad_rows,
        ),
    )
    scorers = [scorer, *([constraint] if constraint else [])]
    for each in scorers:
        each.check_columns([*training, *heldout])
    roles = load_ppo_roles(config)
    longest = max(len(prompt.tokens) for prompt in (*training, *heldout)) + config.response_length
    items = max(config.per_device_train_batch_size, config.per_device_eval_batch_size)
    check_tokens(roles.causal_model(), tokenizer, [prompt.tokens for prompt in (*training, *heldout)])
    check_rope_limit(roles, [*training, *heldout], config)
    check_model(roles, longest + 1, row=config.micro_batch_tokens or items * (longest + 1))
    check_decoding(roles, longest)
    sampler = make_sampler(config, roles, tokenizer)
    if run.checkpoint is None:  # a resumed run was checked when it began, and its policy differs from the reference now
        check_start(roles, sampler, scorers, training, heldout, config, budget)
    trained = sum(parameter.numel() for parameter in roles.trained_parameters().values())
    steps = config.total_steps(len(training))
    for role in roles.trained:
        say(f"{role}: {describe_role(config, roles, role)}.")
    say(
        f"model: {trained:,} trained parameters on {roles.device}, {roles.layout} batches; "
        f"{steps} iterations of {config.episodes_per_step} responses."
    )
    for note in memory_option_notes(roles, config):
        say(note)
    scale = None  # a resumed run reads it from the checkpoint
    if config.normalize_reward and run.checkpoint is None and not config.dry_run:
        scale = measure_scale(roles, sampler, scorer, training, config)
    return PPO(
        config, roles, sampler, scorer, training, heldout, steps, constraint=constraint, scale=scale, budget=budget
    )
