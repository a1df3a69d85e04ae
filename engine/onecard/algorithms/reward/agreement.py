"""How well scores agree with those that were given, over all rows together: these are no sums over micro-batches."""

from __future__ import annotations

from torch import Tensor


def agreement(scores: Tensor, given: Tensor) -> dict[str, float]:
    """Correlations, and the share of pairs of rows in the right order; empty if one side is constant."""
    if scores.unique().numel() < 2 or given.unique().numel() < 2:
        return {}
    return {
        "pearson": pearson(scores, given),
        "spearman": pearson(ranks(scores), ranks(given)),
        "accuracy": concordance(scores, given),
        **labels(scores, given),
    }


def labels(scores: Tensor, given: Tensor) -> dict[str, float]:
    """Where the given scores are two, they are labels: the share that is nearer to its own one than to the other, and
    what the commoner one alone would get right.
    """
    values, counts = given.unique(return_counts=True)
    if len(values) != 2:
        return {}
    right = (scores > values.mean()) == (given == values[1])
    return {"label_accuracy": float(right.double().mean()), "majority_class": float(counts.max() / counts.sum())}


def pearson(x: Tensor, y: Tensor) -> float:
    """The correlation coefficient of [n] and [n]."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).sum() / (x.norm() * y.norm()))


def ranks(values: Tensor) -> Tensor:
    """The rank of each value, counted from 1; equal ones share the mean of their ranks.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 2.0]))
    tensor([3.5000, 1.0000, 3.5000, 2.0000], dtype=torch.float64)
    """
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[index]


def concordance(scores: Tensor, given: Tensor) -> float:
    """The share of pairs of rows with different given scores whose scores are in the same order."""
    right = total = 0
    for index in range(1, len(given)):  # a row of the n x n table at a time
        order = (given[:index] - given[index]).sign()
        same = (scores[:index] - scores[index]).sign() == order
        right += int((same & (order != 0)).sum())
        total += int((order != 0).sum())
    return right / total
