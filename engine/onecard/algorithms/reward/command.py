"""`onecard reward`: settings -> a reward adapter with a scalar head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.algorithms.common import Collation, Recipe, run_recipe
from onecard.algorithms.reward.kinds import (
    KIND_OF_EXAMPLE,
    check_settings,
    collate,
    collate_shared,
    example_size,
    loss_from_scores,
    reward_loss,
    tokenize,
)
from onecard.config import RewardConfig
from onecard.data.batches import TokenBatch, unpack
from onecard.models.micro_batching import TokenBudget, forward_budget
from onecard.models.passes import sequence_passes
from onecard.models.roles import Roles
from onecard.training.metrics import sum_metrics
from onecard.utils.errors import OnecardError
from onecard.utils.progress import Bar, progress, say

MAX_NORMALIZATION_ROWS = 2048  # training rows, at most, whose scores normalize_scores uses


def scores_of(roles: Roles, batch: TokenBatch, budget: TokenBudget, bar: Bar) -> Tensor:
    """Scores fp32 [S] of a batch's sequences, on the CPU."""
    with bar.part("scores", len(batch.lengths)) as part:

        def score(micro_batch: TokenBatch) -> list[Tensor]:
            scores = roles.scores(micro_batch).cpu()
            part.advance(by=len(scores))
            return list(scores)

        return torch.stack(sequence_passes(roles, unpack(batch), budget, score))


def heldout_metrics(
    roles: Roles, examples: Sequence[Any], config: RewardConfig, budget: TokenBudget, bar: Bar
) -> dict[str, float]:
    """Loss and metrics of all held-out examples together."""
    batch = collate(examples)
    scores = scores_of(roles, batch.sequences, budget, bar)
    metrics = sum_metrics([loss_from_scores(scores, batch, config, len(examples))])
    if len(scores) > 1:
        metrics["std_reward"] = float(scores.std())
    return {**metrics, **KIND_OF_EXAMPLE[type(examples[0])].summary(scores, batch)}


def normalize(roles: Roles, examples: Sequence[Any], config: RewardConfig) -> None:
    """Shift and scale the head, so that training rows' scores have mean 0 and standard deviation 1."""
    some = examples[:: math.ceil(len(examples) / MAX_NORMALIZATION_ROWS)]  # every k-th row, because files may be sorted
    with progress("normalize_scores", 1) as bar:
        scores = scores_of(roles, collate(some).sequences, forward_budget(config), bar).double()
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if not std > 0:
        raise OnecardError(
            f"normalize_scores: the answers of {len(some)} training rows all score {mean:g}, so their standard "
            "deviation is 0 and they cannot be scaled. The last checkpoint has the trained weights."
        )
    roles.scalar_head(roles.current).fold(mean, std)
    say(f"normalize_scores: mean {mean:.4g} and standard deviation {std:.4g} of {len(some)} training rows' scores.")


def make_recipe(config: RewardConfig) -> Recipe[Any, Any]:
    """The recipe of a reward run."""
    return Recipe(
        command="reward",
        trained="reward",
        tokenize=lambda rows, tokenizer, max_length: tokenize(rows, tokenizer, max_length, config),
        collate=collate,
        count=len,
        loss=lambda roles, batch, normalizer: reward_loss(roles, batch, config, normalizer),
        scalar=True,
        heldout_metrics=lambda roles, examples, budget, bar: heldout_metrics(roles, examples, config, budget, bar),
        check=lambda examples: check_settings(examples, config),
        prompt_sharing_collation=Collation(collate_shared, example_size) if config.share_prompts else None,
        adjust=(lambda roles, examples: normalize(roles, examples, config)) if config.normalize_scores else None,
    )


def run(config: RewardConfig) -> Path:
    """`onecard reward`. Returns the folder of the reward adapter."""
    config.validate()
    return run_recipe(config, make_recipe(config))
