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

from onecard.algorithms.common import load_examples, longest_sequence, run_task
from onecard.batches import PreferenceBatch, pack_pairs
from onecard.config import RewardConfig
from onecard.data import preference_examples
from onecard.models.build import load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.runs import open_run, with_folder
from onecard.trainer import Task
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
    config = with_folder(config, "reward")
    run = open_run(config)
    tokenizer = load_tokenizer(config)
    max_length = longest_sequence(config)
    training, heldout = load_examples(
        config,
        lambda rows: preference_examples(rows, tokenizer, max_length=max_length, skip_bad_rows=config.skip_bad_rows),
    )
    roles = load_roles(config, trained="reward", scalar=True)
    task = Task(
        name="reward",
        train=training,
        heldout=heldout,
        collate=pack_pairs,
        count=len,
        tokens=len,
        loss=lambda batch, normalizer: reward_loss(roles, batch, config, normalizer),
    )
    return run_task(config, task, roles, tokenizer, run)
