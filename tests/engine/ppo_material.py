"""Answers of PPO that are given instead of sampled, and experiences whose old numbers are a little off."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from onecard.algorithms.ppo.experience import ModelOutputs, compute_model_outputs, make_experiences, shape_rewards
from onecard.config import PPOConfig
from onecard.data.batches import Episode, Experience, TokenSequence
from onecard.models.roles import Roles

# Two answers of 2 and 3 tokens. log-ratios to the reference: 0.5, -0.25 and 1, 0, 0.5.
PASSES = ModelOutputs(
    logprobs=[torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -1.0, -1.5])],
    ref_logprobs=[torch.tensor([-1.5, -1.75]), torch.tensor([-1.5, -1.0, -2.0])],
    values=[torch.tensor([0.5, 0.25]), torch.tensor([1.0, 0.0, -0.5])],
)


def episode(prompt: int, response: int, finished: bool = True) -> Episode:
    """Tokens 3, 4, 5, ..."""
    mask = (False,) * prompt + (True,) * response
    return Episode(TokenSequence(tuple(range(3, 3 + len(mask))), mask), torch.zeros(response), finished)


EPISODES = [episode(2, 2), episode(1, 3, finished=False)]  # those of PASSES


def random_episode(index: int, prompt: int, response: int, finished: bool = True) -> Episode:
    generator = torch.Generator().manual_seed(index)
    tokens = tuple(torch.randint(3, 300, (prompt + response,), generator=generator).tolist())
    mask = (False,) * prompt + (True,) * response
    return Episode(TokenSequence(tokens, mask), torch.zeros(response), finished)


def experiences(roles: Roles, config: PPOConfig, count: int = 4, away: float = 0.3) -> list[Experience]:
    """Of many lengths, so that a mean of means differs from the mean; old numbers `away`, so that some clip."""
    episodes = [random_episode(i, 1 + 2 * i, 2 + (3 * i) % 7) for i in range(count)]
    passes = compute_model_outputs(roles, episodes, config)
    made = make_experiences(episodes, passes, shape_rewards(passes, torch.linspace(-1, 2, count), 0.1, config))
    torch.manual_seed(3)

    def off(old: Tensor | None) -> Tensor | None:
        return None if old is None else old + away * torch.randn_like(old)

    return [replace(x, old_logprobs=off(x.old_logprobs), old_values=off(x.old_values)) for x in made]
