"""Prompts -> rollout -> episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onecard.config import PPOConfig
from onecard.data import Prompt
from onecard.data.batches import Episode
from onecard.models.micro_batching import TokenBudget
from onecard.models.roles import Roles
from onecard.rollout import (
    Rollout,
    Sampling,
    StopStrings,
    find_stop_tokens,
    make_episode,
    sample_responses,
    sampling_budget,
)
from onecard.utils.progress import Bar


@dataclass(frozen=True)
class Sampled:
    """Episodes in the order of their prompts, and the rollout with its wall time."""

    episodes: list[Episode]
    rollout: Rollout


@dataclass(frozen=True)
class Sampler:
    """Samples a run's responses from the policy, at the run's temperature."""

    tokenizer: Any
    sampling: Sampling
    stop_tokens: frozenset[int]
    budget: TokenBudget
    stop_strings: StopStrings | None = None

    def sample(self, roles: Roles, prompts: Sequence[Prompt], bar: Bar | None) -> Sampled:
        """One episode for each prompt."""
        rollout = sample_responses(
            roles,
            [prompt.tokens for prompt in prompts],
            self.sampling,
            stop_tokens=self.stop_tokens,
            stop_strings=self.stop_strings,
            batch_size=self.budget,
            bar=bar,
        )
        episodes = [make_episode(prompt, response) for prompt, response in zip(prompts, rollout.responses, strict=True)]
        return Sampled(episodes, rollout)


def rollout_budget(config: PPOConfig) -> TokenBudget:
    """The limits on prompts that are sampled together: their number, and the size of their KV cache."""
    return sampling_budget(config.local_rollout_forward_batch_size, int(config.rollout_cache_gib * 2**30))


def make_sampler(config: PPOConfig, roles: Roles, tokenizer: Any) -> Sampler:
    """The run's sampler: response length, temperature, stop tokens and stop strings come from the settings."""
    stop_tokens = find_stop_tokens(roles, tokenizer, config.stop_token)
    sampling = Sampling(config.response_length, config.temperature)
    stop_strings = StopStrings(tokenizer, config.stop_token) if config.stop_token else None
    return Sampler(tokenizer, sampling, stop_tokens, rollout_budget(config), stop_strings)
