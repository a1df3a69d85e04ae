"""Agreement of the model's scores with the dataset's (`given`). It is no sum over micro-batches: it needs all rows."""

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
        **label_metrics(scores, given),
    }


def label_metrics(scores: Tensor, given: Tensor) -> dict[str, float]:
    """Metrics for given scores with two values, which are then labels; empty for other numbers of values.

    `label_accuracy`: share of scores that are nearer to their own label than to the other. `majority_class`: the
    accuracy of always predicting the more frequent label.
    """
    values, counts = given.unique(return_counts=True)
    if len(values) != 2:
        return {}
    correct = (scores > values.mean()) == (given == values[1])
    return {"label_accuracy": float(correct.double().mean()), "majority_class": float(counts.max() / counts.sum())}


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation coefficient of x [n] and y [n]."""
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
    """Share of pairs in the right order, among the pairs of rows whose given scores differ."""
    correct = total = 0
    for index in range(1, len(given)):  # one row of the [n, n] comparisons at a time, to save memory
        order = (given[:index] - given[index]).sign()
        same = (scores[:index] - scores[index]).sign() == order
        correct += int((same & (order != 0)).sum())
        total += int((order != 0).sum())
    return correct / total
