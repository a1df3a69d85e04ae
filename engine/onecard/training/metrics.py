"""Reduce metrics over micro-batches and steps for `metrics.jsonl`; measure memory peaks.

A loss and its metrics are already divided by the step's normaliser, so those of the micro-batches are summed.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from onecard_kernels import Loss

REDUCE_BY_PREFIX = {"min_": torch.minimum, "max_": torch.maximum}


def sum_metrics(losses: Iterable[Loss]) -> dict[str, float]:
    """Sum the loss and metrics of a step's micro-batches; `min_...` and `max_...` take the minimum and maximum.

    Waits for the device, because it copies the values to the CPU.
    """
    total: dict[str, torch.Tensor] = {}
    for loss in losses:
        for name, value in {"loss": loss.loss.detach(), **loss.metrics}.items():
            total[name] = REDUCE_BY_PREFIX.get(name[:4], torch.add)(total[name], value) if name in total else value
    return {name: float(value) for name, value in total.items()}


SUM = "_sum"  # suffix of a metric that is a sum


def divide_sums_by_counts(row: dict[str, float]) -> dict[str, float]:
    """Replace each `NAME/KIND_sum` and its `count/KIND` by the mean `NAME/KIND`; a count of 0 gives no mean.

    Sums and counts can be added over micro-batches and steps. Means over different numbers of examples cannot.

    >>> sums = {"logps/chosen_sum": 3.0, "count/chosen": 2.0, "logps/rejected_sum": 0.0, "count/rejected": 0.0}
    >>> divide_sums_by_counts(sums)
    {'logps/chosen': 1.5}
    """
    means = {name: value for name, value in row.items() if not name.endswith(SUM) and not name.startswith("count/")}
    for name, value in row.items():
        mean = name.removesuffix(SUM)
        count = row.get(f"count/{mean.rpartition('/')[2]}", 0.0)
        if name.endswith(SUM) and count:
            means[mean] = value / count
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
    return means


def peak_memory_gib() -> float:
    """Peak memory of the run so far: allocated on the GPU, or without one the process's resident memory."""
    if torch.cuda.is_available():
        return max(EARLIER_PEAK[0], torch.cuda.max_memory_allocated() / 2**30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # Linux counts in KiB


# GiB: the peak before `phase_memory` last reset PyTorch's counter. A list, so that it can be changed in place.
EARLIER_PEAK = [0.0]


@contextmanager
def phase_memory(row: dict[str, float], name: str) -> Iterator[None]:
    """Context that sets `row[name]` to the phase's peak GPU memory in GiB, or on CPU to resident memory at its end."""
    if torch.cuda.is_available():
        EARLIER_PEAK[0] = peak_memory_gib()
        torch.cuda.reset_peak_memory_stats()
    yield
    row[name] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else resident_memory_gib()
    if torch.cuda.is_available():  # the next phase allocates other sizes, which do not fit into this phase's blocks
        torch.cuda.empty_cache()


def resident_memory_gib() -> float:
    """Resident memory of the process now; on systems other than Linux, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_gib()
    return pages * resource.getpagesize() / 2**30


class MetricsWindow:
    """Sums of per-step metrics since the last logged row. Checkpoints save them: a resumed run logs the same."""

    def __init__(self, sums: dict[str, float] | None = None, steps: dict[str, int] | None = None) -> None:
        self.sums = dict(sums or {})
        self.steps = dict(steps or {})  # steps that had the metric: a PPO step without an update has no loss

    def add(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.steps[name] = self.steps.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Return the means and reset."""
        means = {name: value / self.steps[name] for name, value in self.sums.items()}
        self.sums, self.steps = {}, {}
        return divide_sums_by_counts(means)

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}
