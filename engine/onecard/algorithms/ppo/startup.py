"""PPO's checks before the first step, on a few sampled answers. Nothing has been written yet.

Each reward scores the answers, so one that always fails stops the run here. Three pairs of log-probs of the same tokens
are compared, because PPO's ratio is wrong if they differ:

| log-probs | compared with | cause of a difference |
|---|---|---|
| returned by sampling | old log-probs | the sampled distribution was changed; masks or positions are wrong |
| new log-probs, as in a minibatch | old log-probs | dropout; layouts that do not agree |
| the reference's | old log-probs | the policy does not start as the reference |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onecard.algorithms.ppo.experience import response_logprobs
from onecard.algorithms.ppo.sampling import Sampler
from onecard.config import PPOConfig
from onecard.data import Prompt
from onecard.data.batches import Episode, ResponseTargets, TokenBatch
from onecard.models.load import find_source
from onecard.models.micro_batching import TRAINING_MESSAGES, MicroBatchSize, TokenBudget
from onecard.models.passes import per_token
from onecard.models.roles import Roles
from onecard.rewards.scorer import Scorer
from onecard.utils.errors import OnecardError
from onecard.utils.rng import seeded_rng

CHECKED_PROMPTS = 8
# Largest allowed (mean, maximum) of differences in nats. In 16 bit they are rounding, largest for unlikely tokens.
TOLERANCES = {torch.float32: (1e-4, 1e-3)}
TOLERANCES_16_BIT = (0.05, 1.0)
CHECK_MESSAGES = replace(TRAINING_MESSAGES, smaller="the startup check continues in micro-batches of at most {size}.")


def new_logprobs(roles: Roles, episodes: Sequence[Episode], config: PPOConfig) -> Tensor:
    """Log-probs computed as in a minibatch: in training mode, with gradients."""
    budget = TokenBudget(MicroBatchSize(config.per_device_train_batch_size, config.micro_batch_tokens), CHECK_MESSAGES)

    def read(batch: TokenBatch, targets: ResponseTargets) -> Tensor:
        with torch.enable_grad():
            return roles.logprobs(batch, targets, config.temperature).detach()

    return torch.cat(per_token(roles, "policy", episodes, read, budget))


def check_start(
    roles: Roles,
    sampler: Sampler,
    scorers: Sequence[Scorer],
    training: Sequence[Prompt],
    heldout: Sequence[Prompt],
    config: PPOConfig,
    budget: TokenBudget,
) -> None:
    """Raise if a reward fails, or if log-probs that must be equal differ. Random states are left unchanged."""
    was_training = roles.training
    parts = [prompts[:CHECKED_PROMPTS] for prompts in (training, heldout) if prompts]
    episodes: list[Episode] = []
    with seeded_rng(roles.device, config.seed, "start"):
        for prompts in parts:
            sampled = sampler.sample(roles, prompts, None).episodes
            for scorer in scorers:
                scorer.scores(roles, sampler.tokenizer, prompts, sampled)
            episodes += sampled
    compare_logprobs(roles, episodes, config, budget)
    roles.train(was_training)


def compare_logprobs(roles: Roles, episodes: Sequence[Episode], config: PPOConfig, budget: TokenBudget) -> None:
    """Compare the pairs of log-probs. New and old come first: with dropout all pairs differ, and this names the cause.

    The policy is not compared with the reference if `ref_adapter` is not the adapter that the policy starts from.
    """
    roles.train()
    sampled = torch.cat([episode.sampling_logprobs for episode in episodes])
    old = torch.cat(response_logprobs(roles, "policy", episodes, config, budget))
    reference = torch.cat(response_logprobs(roles, "reference", episodes, config, budget))
    new = new_logprobs(roles, episodes, config)
    mean, largest = TOLERANCES.get(roles.causal_model().dtype, TOLERANCES_16_BIT)
    scale = min(1.0, config.temperature)  # a temperature below 1 magnifies the rounding of logits
    limits = (mean / scale, largest / scale)
    compare("the policy's log-probs in training and in the pass that computes the old ones", new, old, limits)
    compare("the sampled tokens' log-probs from sampling and from a pass of the policy", sampled, old, limits)
    if starts_as_reference(config):
        compare("the log-probs of the policy and of the reference, equal at the start,", old, reference, limits)


def starts_as_reference(config: PPOConfig) -> bool:
    """Whether the policy starts with the reference's weights: no `ref_adapter`, or the policy's own folder."""
    if not config.ref_adapter:
        return True
    policy, reference = (find_source(name).adapter for name in (config.model, config.ref_adapter))
    return policy is not None and reference is not None and policy.resolve() == reference.resolve()


def compare(names: str, first: Tensor, second: Tensor, limits: tuple[float, float]) -> None:
    """Raise if two log-probs of the same tokens differ by more than `limits` (mean, maximum). `names`: of the two."""
    difference = (first - second).abs()
    mean, largest = float(difference.mean()), float(difference.max())
    if not (mean <= limits[0] and largest <= limits[1]):
        raise OnecardError(
            f"startup check: {names} differ by {mean:.3g} nat on average and {largest:.3g} at most "
            f"(limits {limits[0]:g}, {limits[1]:g}), so PPO's ratio would be wrong from the start. Nothing was trained."
        )
