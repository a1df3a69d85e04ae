"""A reward model from pairs (Bradley-Terry).

    loss = -1/B sum_i log sigmoid(r(x, y+) - r(x, y-) - margin)  +  c (r(x, y+) + r(x, y-))^2

Sources: Ouyang et al., 2022 (https://arxiv.org/abs/2203.02155, eq. 1); margins: Touvron et al., 2023
(https://arxiv.org/abs/2307.09288, eq. 2); centering: Eisenstein et al., 2023 (https://arxiv.org/abs/2312.09244).
The score is read from the hidden state of each sequence's last token.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn.functional import logsigmoid

from onecard.algorithms.common import Recipe, pair_tokenizer, run_recipe
from onecard.batches import PreferenceBatch, pack_pairs
from onecard.config import RewardConfig
from onecard.models.roles import Roles
from onecard_kernels import Loss


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor, *, center_rewards_coefficient: float, normalizer: int
) -> Loss:
    """The loss above for scores fp32 [B]; metrics by TRL's names, each divided by `normalizer`."""
    difference = chosen - rejected
    losses = -logsigmoid(difference - margins) + center_rewards_coefficient * (chosen + rejected).square()
    metrics = {
        "accuracy": (difference > 0).float(),
        "margin": difference,
        "mean_reward": (chosen + rejected) / 2,
    }
    return Loss(losses.sum() / normalizer, {name: value.detach().sum() / normalizer for name, value in metrics.items()})


def reward_loss(roles: Roles, batch: PreferenceBatch, config: RewardConfig, normalizer: int) -> Loss:
    """Scores of both answers, then the loss."""
    chosen, rejected = roles.scores(batch.sequences).chunk(2)
    return bradley_terry_loss(
        chosen,
        rejected,
        batch.margins,
        center_rewards_coefficient=config.center_rewards_coefficient,
        normalizer=normalizer,
    )


def run(config: RewardConfig) -> Path:
    """`onecard reward`. Returns the folder of the reward adapter."""
    recipe = Recipe(
        command="reward",
        trained="reward",
        tokenize=pair_tokenizer(config),
        collate=pack_pairs,
        count=len,
        loss=lambda roles, batch, normalizer: reward_loss(roles, batch, config, normalizer),
        scalar=True,
    )
    return run_recipe(config, recipe)
