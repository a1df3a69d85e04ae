"""Advantages of an iteration's answers from their rewards, by `--advantage_estimator`.

| estimator | advantage of token t | critic | passes | ratio |
|---|---|---|---|---|
| gae | generalized advantage estimation, whitened [1] | yes | num_ppo_epochs | clipped |
| a2c | the same with lam = 1: return minus value, whitened [2] | yes | 1 | not clipped |
| reinforce | reward-to-go, whitened: the batch's mean is the baseline [3] | no | 1 | not clipped |
| rloo | the answer's whole reward - mean of the others' to its prompt [4] | no | num_ppo_epochs | clipped |
| grpo | (the answer's whole reward - its group's mean) / std [5] | no | num_ppo_epochs | clipped |

[1] https://arxiv.org/abs/1506.02438  [2] https://arxiv.org/abs/1602.01783  [3] REINFORCE++,
https://arxiv.org/abs/2501.03262  [4] https://arxiv.org/abs/2402.14740  [5] https://arxiv.org/abs/2402.03300
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from onecard_kernels import Advantages, gae, group_advantages, masked_whiten


@dataclass(frozen=True)
class AdvantageInput:
    """B responses of up to T tokens. `rewards` fp32 [B, T] include KL and score; `mask` bool [B, T] marks tokens.

    An answer that a constraint skips has no True in its row of the mask: it is in no mean, no baseline, no group.
    `values` fp32 [B, T] and `last_values` fp32 [B] (of the state after the last token) are the critic's, None without
    one. `group_size` successive answers have the same prompt.

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


def whitened_gae(inputs: AdvantageInput) -> Advantages:
    """GAE of each response; advantages whitened over all tokens with a True in the mask."""
    if inputs.values is None:
        raise ValueError("values is None, expected the critic's values")
    estimated = gae(
        inputs.rewards, inputs.values, inputs.mask, gamma=inputs.gamma, lam=inputs.lam, last_values=inputs.last_values
    )
    return Advantages(masked_whiten(estimated.advantages, inputs.mask), estimated.returns)


def actor_critic(inputs: AdvantageInput) -> Advantages:
    """Reward-to-go minus the critic's value, whitened: GAE at lam = 1."""
    return whitened_gae(replace(inputs, lam=1.0))


def reinforce(inputs: AdvantageInput) -> Advantages:
    """Reward-to-go, whitened: `actor_critic` with values of 0."""
    return actor_critic(replace(inputs, values=torch.zeros_like(inputs.rewards)))


def group_estimate(inputs: AdvantageInput, kind: str) -> Advantages:
    """rloo and grpo: the summed reward of a response against those of its group; the same for all of its tokens.

    The advantage is 0 if all others of the group are skipped.
    """
    in_loss = inputs.mask.any(1)
    sums = torch.where(inputs.mask, inputs.rewards, 0.0).sum(1)
    advantages = torch.zeros_like(sums)
    for group in torch.arange(len(sums)).split(inputs.group_size):
        chosen = group[in_loss[group]]
        if len(chosen) > 1:
            advantages[chosen] = group_advantages(sums[chosen], group_size=len(chosen), kind=kind)
    return Advantages(*(torch.where(inputs.mask, each.unsqueeze(1), 0.0) for each in (advantages, sums)))


def with_group_peers(in_loss: Tensor, group_size: int) -> Tensor:
    """`in_loss` bool [B] without the responses that are the only one of their group in the loss.

    >>> with_group_peers(torch.tensor([True, True, True, False]), 2)
    tensor([ True,  True, False, False])
    """
    groups = in_loss.view(-1, group_size)
    return (groups & (groups.sum(1, keepdim=True) > 1)).flatten()


# `PPOConfig` says which of them need a critic or groups, and which make one pass over the answers.
ESTIMATORS: dict[str, Callable[[AdvantageInput], Advantages]] = {
    "gae": whitened_gae,
    "a2c": actor_critic,
    "reinforce": reinforce,
    "rloo": partial(group_estimate, kind="rloo"),
    "grpo": partial(group_estimate, kind="grpo"),
}
