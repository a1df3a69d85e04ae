"""What can be said of a set of answers: means and how sure they are, a win rate, variety."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z95 = 1.959964  # of a normal distribution, 95 % lies within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error, where there is one."""

    mean: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.stderr is None else f"{self.mean:.4g} ± {self.stderr:.2g}"


@dataclass(frozen=True)
class WinRate:
    """The share of prompts that the policy's answer wins, a tie counting half, and its 95 % interval."""

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
    """Mean and standard error `s / sqrt(n)`, where s has n - 1 in its denominator; one value has no error.

    >>> estimate([1.0, 3.0])
    Estimate(mean=2.0, stderr=1.0)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count))


def win_rate(policy: Sequence[float], baseline: Sequence[float]) -> WinRate:
    """Scores of two answers to each prompt -> the share p that the policy wins, and Wilson's interval of it:

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   z = 1.96

    Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953. A tie counts half, which varies less than a win or a
    loss, so with ties the interval is, if anything, too wide.
    """
    pairs = list(zip(policy, baseline, strict=True))
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    n, z = len(pairs), Z95
    p = (wins + ties / 2) / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return WinRate(p, min(max(low, 0.0), p), max(min(high, 1.0), p), wins, ties, n - wins - ties)


def distinct(answers: Iterable[Sequence[int]], n: int) -> float:
    """Distinct runs of n tokens over all of them, in all answers together; 0 where there are none.

    Li et al., 2016, https://arxiv.org/abs/1510.03055.

    >>> distinct([[7, 8, 7], [7, 8]], 2)
    0.6666666666666666
    """
    runs = [tuple(answer[start : start + n]) for answer in answers for start in range(len(answer) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0
