"""Rewards to advantages: what each `--advantage_estimator` makes of an iteration's answers.

| estimator | advantage of token t | critic | passes | ratio |
|---|---|---|---|---|
| gae | generalized advantage estimation, whitened [1] | yes | num_ppo_epochs | clipped |
| a2c | the same with lam = 1: return minus value, whitened [2] | yes | 1 | free |
| reinforce | reward-to-go, whitened: the batch's mean is the baseline [3] | no | 1 | free |
| rloo | the answer's whole reward - mean of the others' to its prompt [4] | no | num_ppo_epochs | clipped |
| grpo | (the answer's whole reward - its group's mean) / std [5] | no | num_ppo_epochs | clipped |

[1] https://arxiv.org/abs/1506.02438  [2] https://arxiv.org/abs/1602.01783  [3] REINFORCE++,
https://arxiv.org/abs/2501.03262  [4] https://arxiv.org/abs/2402.14740  [5] https://arxiv.org/abs/2402.03300
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onecard_kernels import Advantages, gae, group_advantages, masked_whiten


@dataclass(frozen=True)
class AdvantageInput:
    """B responses of up to T tokens. `rewards` fp32 [B, T] include KL and score; `mask` bool [B, T] marks tokens.

    An answer that is not learned from has no True in its row of the mask: it is in no mean, no baseline, no group.
    `values` fp32 [B, T] and `last_values` fp32 [B] (of the state after the last token) are the critic's, None without
    one. Each group_size answers in a row have the same prompt.

    Two answers of 2 and 1 tokens, with scores 2 and -1 and no KL:

        rewards  [[0, 2], [-1, 0]]    mask  [[x, x], [x, .]]
    """

    rewards: Tensor
    mask: Tensor
    values: Tensor | None = None
    last_values: Tensor | None = None
    gamma: float = 1.0
    lam: float = 0.95
    group_size: int = 1


def generalized(given: AdvantageInput) -> Advantages:
    """GAE of each response; advantages whitened over all unmasked tokens."""
    if given.values is None:
        raise ValueError("values is None, expected the critic's")
    found = gae(
        given.rewards, given.values, given.mask, gamma=given.gamma, lam=given.lam, last_values=given.last_values
    )
    return Advantages(masked_whiten(found.advantages, given.mask), found.returns)


def actor_critic(given: AdvantageInput) -> Advantages:
    """Reward-to-go minus the critic's value, whitened: GAE at lam = 1."""
    return generalized(replace(given, lam=1.0))


def reinforce(given: AdvantageInput) -> Advantages:
    """Reward-to-go, whitened: `actor_critic` with values of 0."""
    return actor_critic(replace(given, values=torch.zeros_like(given.rewards)))


def in_groups(given: AdvantageInput, kind: str) -> Advantages:
    """Advantage of a response's summed reward over the other responses to its prompt; the same for all of its tokens.

    An answer whose others are all left out has nothing to be compared with: its advantage is 0.
    """
    kept = given.mask.any(1)
    sums = torch.where(given.mask, given.rewards, 0.0).sum(1)
    advantages = torch.zeros_like(sums)
    for group in torch.arange(len(sums)).split(given.group_size):
        chosen = group[kept[group]]
        if len(chosen) > 1:
            advantages[chosen] = group_advantages(sums[chosen], group_size=len(chosen), kind=kind)
    return Advantages(*(torch.where(given.mask, each.unsqueeze(1), 0.0) for each in (advantages, sums)))


def with_group_peers(kept: Tensor, group_size: int) -> Tensor:
    """Of the responses that are kept, bool [B], those with another kept one in their group.

    >>> with_company(torch.tensor([True, True, True, False]), 2)
    tensor([ True,  True, False, False])
    """
    groups = kept.view(-1, group_size)
    return (groups & (groups.sum(1, keepdim=True) > 1)).flatten()


def leave_one_out(given: AdvantageInput) -> Advantages:
    return in_groups(given, "rloo")


def group_relative(given: AdvantageInput) -> Advantages:
    return in_groups(given, "grpo")


# `PPOConfig` says which need a critic or groups, and which pass over the answers once.
ESTIMATORS: dict[str, Callable[[AdvantageInput], Advantages]] = {
    "gae": generalized,
    "a2c": actor_critic,
    "reinforce": reinforce,
    "rloo": leave_one_out,
    "grpo": group_relative,
}
