"""Statistics of a set of responses: means with standard errors, a win rate, and distinct n-grams."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z95 = 1.959964  # 95 % of a normal distribution is within this many standard deviations of the mean


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and its standard error if it has one."""

    mean: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.stderr is None else f"{self.mean:.4g} ± {self.stderr:.2g}"


@dataclass(frozen=True)
class WinRate:
    """The share of prompts where the policy's response wins (a tie counts half), and its 95 % interval."""

    mean: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        counts = f"{self.wins} won, {self.ties} tied, {self.losses} lost"
        return f"{self.mean:.3f}, 95 % interval {self.low:.3f} to {self.high:.3f} ({counts})"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error `s / sqrt(n)`; s has n - 1 in its denominator. One value has no standard error.

    >>> estimate([1.0, 3.0])
    Estimate(mean=2.0, stderr=1.0)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count))


def win_rate(policy: Sequence[float], baseline: Sequence[float]) -> WinRate:
    """The share p of prompts where the policy's score is higher than the baseline's, and its Wilson interval:

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   z = 1.96

    Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953. A tie counts half. Ties have less variance than wins
    and losses, so with ties the interval may be wider than necessary.
    """
    pairs = list(zip(policy, baseline, strict=True))
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    n, z = len(pairs), Z95
    p = (wins + ties / 2) / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return WinRate(p, min(max(low, 0.0), p), max(min(high, 1.0), p), wins, ties, n - wins - ties)


def distinct(responses: Iterable[Sequence[int]], n: int) -> float:
    """Number of distinct n-grams divided by the number of n-grams, over all responses; 0 without n-grams.

    Li et al., 2016, https://arxiv.org/abs/1510.03055.

    >>> distinct([[7, 8, 7], [7, 8]], 2)
    0.6666666666666666
    """
    ngrams = [tuple(tokens[start : start + n]) for tokens in responses for start in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
