"""`onecard ppo`: settings -> a trained policy. Nothing is written before everything is loaded and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onecard.algorithms.common import (
    describe_adapter,
    export_and_report,
    load_examples,
    effective_max_length,
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


def described_role(config: PPOConfig, roles: Roles, role: str) -> str:
    """A trained role in words, such as an adapter or a head on the policy."""
    if not roles.has_own_weights(role):
        return "a head on the policy"
    adapters = {
        "policy": find_source(config.model).adapter,
        "value": reward_adapter(config) if config.value_init == "reward" else None,
    }
    return describe_adapter(roles, role, adapters[role])


def longest_prompt(config: PPOConfig) -> int:
    """Tokens that are left for a prompt beside the response."""
    limit = effective_max_length(config)
    eos = 1 if config.reward_model_path or config.constraint_model_path else 0  # a cut answer gets one to be judged
    room = limit - config.response_length - eos
    if room < 1:
        raise OnecardError(
            f"response_length: {config.response_length} leaves no room for a prompt in {limit} tokens, the smaller of "
            f"max_length ({config.max_length}) and the model's context."
        )
    return room


def with_passes(config: PPOConfig) -> PPOConfig:
    """The same settings with num_ppo_epochs 1 for an estimator that passes over the answers once; says so."""
    if not config.is_single_pass or config.num_ppo_epochs == 1:
        return config
    name = config.advantage_estimator
    say(f"num_ppo_epochs: 1 instead of {config.num_ppo_epochs}: {name} passes over an iteration's answers once.")
    return replace(config, num_ppo_epochs=1)


def check_value_init(config: PPOConfig) -> None:
    """Refuse normalize_reward with a critic that starts as the reward adapter."""
    copies = config.has_critic and config.critic == "adapter" and config.value_init == "reward"
    if config.normalize_reward and copies and reward_adapter(config) is not None:
        raise OnecardError(
            "normalize_reward: expected --value_init zero with it: the critic would start as the reward model, whose "
            "scores are on another scale."
        )


def check_rotations(roles: Roles, prompts: Sequence[Prompt], config: PPOConfig) -> None:
    """Refuse responses that cross the length at which the model's RoPE changes: their log-probs would change."""
    limit = rotation_limit(trunk_of(roles.causal_model()).config)
    crossing = [p for p in prompts if limit and len(p.tokens) <= limit < len(p.tokens) + config.response_length]
    if crossing:
        raise OnecardError(
            f"response_length: a prompt of {len(crossing[0].tokens)} tokens with an answer of {config.response_length} "
            f"crosses {limit} tokens, from which on the model rotates a whole text by other factors (RoPE): its tokens "
            f"would not have the log-probs they were drawn with. Keep prompts and answers within {limit} tokens."
        )


def run(config: PPOConfig) -> Path:
    """`onecard ppo`. Returns the folder of the trained policy."""
    config.validate()
    check_value_init(config)
    config = with_passes(with_output_dir(config, "ppo"))
    run = open_run(config)
    with head_chunks(config.head_chunk_tokens), template_date(run.date):
        job = prepare(config, run)
        if config.dry_run:
            dry_run.show(config, job.roles, job.sampler.tokenizer, job.prompts[0])
            return run.folder
        with locked(run):
            Trainer(config, job, job.roles, run).train(ppo_identity(config, job.prompts, job.heldout))
            return export_and_report(job.roles, job.sampler.tokenizer, run)


def prepare(config: PPOConfig, run: Run) -> PPO:
    """The job of a run, with everything loaded and checked."""
    budget = forward_budget(config)
    scorer, constraint = load_scorer(config, budget), load_constraint(config, budget)
    for setting in SCORER_SETTINGS.values():
        reward_adapter(config, setting)
    tokenizer = load_tokenizer(config)
    room = longest_prompt(config)
    training, heldout = load_examples(
        config,
        lambda rows: prompt_examples(
            rows,
            tokenizer,
            max_length=room,
            truncation_mode=config.truncation_mode,
            skip_bad_rows=config.skip_bad_rows,
        ),
    )
    for each in filter(None, (scorer, constraint)):
        each.check_columns([*training, *heldout])
    roles = load_ppo_roles(config)
    longest = max(len(prompt.tokens) for prompt in (*training, *heldout)) + config.response_length
    items = max(config.per_device_train_batch_size, config.per_device_eval_batch_size)
    check_tokens(roles.causal_model(), tokenizer, [prompt.tokens for prompt in (*training, *heldout)])
    check_rotations(roles, [*training, *heldout], config)
    check_model(roles, longest + 1, row=config.micro_batch_tokens or items * (longest + 1))
    check_decoding(roles, longest)
    sampler = make_sampler(config, roles, tokenizer)
    scorers = [scorer, *([constraint] if constraint else [])]
    if run.checkpoint is None:  # a run that goes on has been checked, and its policy has left the reference
        check_start(roles, sampler, scorers, training, heldout, config, budget)
    trained = sum(parameter.numel() for parameter in roles.trained_parameters().values())
    steps = config.total_steps(len(training))
    for role in roles.trained:
        say(f"{role}: {described_role(config, roles, role)}.")
    say(
        f"model: {trained:,} trained parameters on {roles.device}, {roles.layout} batches; "
        f"{steps} iterations of {config.episodes_per_step} responses."
    )
    for note in memory_option_notes(roles, config):
        say(note)
    begins = config.normalize_reward and run.checkpoint is None and not config.dry_run
    scale = measure_scale(roles, sampler, scorer, training, config) if begins else None
    return PPO(
        config, roles, sampler, scorer, training, heldout, steps, constraint=constraint, scale=scale, budget=budget
    )
