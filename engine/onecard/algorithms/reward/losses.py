"""Losses of reward models, and their metrics under TRL's names.

Pairs (Bradley-Terry):

    loss = 1/B sum_i  -log sigmoid(r(x, y+) - r(x, y-) - margin)  +  c (r(x, y+) + r(x, y-))^2

Rankings of K answers: the mean of that loss over the K (K - 1) / 2 pairs of a ranking, then the mean over rankings.

Regression to given scores s:

    loss = 1/B sum_i (r(x, y) - s)^2

Sources: Ouyang et al., 2022 (https://arxiv.org/abs/2203.02155, eq. 1); margins: Touvron et al., 2023
(https://arxiv.org/abs/2307.09288, eq. 2); centering: Eisenstein et al., 2023 (https://arxiv.org/abs/2312.09244).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from onecard_kernels import Loss


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor,
    *,
    center_rewards_coefficient: float,
    normalizer: int,
    weights: Tensor | float = 1.0,
) -> Loss:
    """Loss and metrics of pairs, with scores fp32 [B]: sums weighted by `weights`, divided by `normalizer`."""
    difference = chosen - rejected
    losses = -logsigmoid(difference - margins) + center_rewards_coefficient * (chosen + rejected).square()
    metrics = {
        "accuracy": (difference > 0).float(),
        "margin": difference,
        "mean_reward": (chosen + rejected) / 2,
    }
    means = {name: (weights * value.detach()).sum() / normalizer for name, value in metrics.items()}
    return Loss((weights * losses).sum() / normalizer, means)


def ranking_loss(scores: Tensor, counts: Sequence[int], *, center_rewards_coefficient: float, normalizer: int) -> Loss:
    """Loss of rankings. `scores` fp32: ranking after ranking, each with its `counts[r]` answers, the best first."""
    better, worse, weights = ranking_pairs(counts, scores.device)
    return bradley_terry_loss(
        scores[better],
        scores[worse],
        torch.zeros_like(weights),
        center_rewards_coefficient=center_rewards_coefficient,
        normalizer=normalizer,
        weights=weights,
    )


def ranking_pairs(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of each pair's better and worse answer, and its weight. The weights of a ranking's pairs add up to 1.

    >>> ranking_pairs([2, 3], torch.device("cpu"))[:2]
    (tensor([0, 2, 2, 3]), tensor([1, 3, 4, 4]))
    """
    pairs, weights, start = [], [], 0
    for count in counts:
        pairs.append(start + torch.combinations(torch.arange(count)))
        weights += [2 / (count * (count - 1))] * len(pairs[-1])
        start += count
    better, worse = torch.cat(pairs).to(device).unbind(1)
    return better, worse, torch.tensor(weights, device=device)


def regression_loss(scores: Tensor, targets: Tensor, *, normalizer: int) -> Loss:
    """Mean squared error of predicted scores to the dataset's scores `targets`, both fp32 [B]."""
    mse = (scores - targets).square().sum() / normalizer
    return Loss(mse, {"mse": mse.detach(), "mean_reward": scores.detach().sum() / normalizer})
