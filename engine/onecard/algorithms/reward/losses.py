"""Losses of scores, and the metrics that go with them, by TRL's names.

Pairs (Bradley-Terry):

    loss = 1/B sum_i  -log sigmoid(r(x, y+) - r(x, y-) - margin)  +  c (r(x, y+) + r(x, y-))^2

Rankings of K answers, the best first: the mean of the same over a ranking's K (K - 1) / 2 pairs, then over rankings.

Scores s:

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
    """The loss of pairs, for scores fp32 [B]; it and its metrics count each pair by its weight, over `normalizer`."""
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
    """The loss of rankings. `scores` fp32, those of a ranking's `counts[r]` answers together, the best first."""
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
    """Places of each pair's better and worse answer, and its weight: those of a ranking add up to 1.

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


def regression_loss(scores: Tensor, given: Tensor, *, normalizer: int) -> Loss:
    """The loss of scores, fp32 [B] both."""
    mse = (scores - given).square().sum() / normalizer
    return Loss(mse, {"mse": mse.detach(), "mean_reward": scores.detach().sum() / normalizer})
