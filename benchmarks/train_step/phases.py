"""Time and peak memory of the phases of a training step."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import accumulate
from typing import Any

import torch

from benchmarks import measure
from benchmarks.records import WHOLE

ROLLOUT, REWARD, OLD, REFERENCE, VALUES = "rollout", "reward", "old log-probs", "reference log-probs", "values"
TRAIN, OPTIMIZER = "train", "optimizer"
PHASES = (ROLLOUT, REWARD, OLD, REFERENCE, VALUES, TRAIN, OPTIMIZER)
MARK = "phase: "


@dataclass
class PhaseTimer:
    """Seconds and peaks by phase, of one step. Repeated phases are summed."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # seconds of each phase's first occurrence
    peaks: dict[str, int] = field(default_factory=dict)  # on a GPU: all that was allocated at once
    held: int = 0  # on a GPU: what was allocated when the step began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block, and take its peak."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        began = self.clock()
        with torch.profiler.record_function(MARK + name):
            yield
        if on_gpu:
            torch.cuda.synchronize(self.device)
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
        taken = self.clock() - began
        self.first.setdefault(name, taken)
        self.seconds[name] = self.seconds.get(name, 0.0) + taken

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The whole step. On a GPU the phases reset the peak: the step's is their highest."""
        if self.device.type == "cpu":
            with self.phase(WHOLE):
                yield
            return
        torch.cuda.synchronize(self.device)
        self.held, began = torch.cuda.memory_allocated(self.device), self.clock()
        yield
        torch.cuda.synchronize(self.device)
        self.seconds[WHOLE] = self.clock() - began
        self.peaks[WHOLE] = max(self.peaks.values())

    def wrap(self, name: str | Callable[..., str], work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` as a phase; its name may depend on what `work` is given."""

        @wraps(work)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(*arguments, **keywords)):
                return work(*arguments, **keywords)

        return watched


@dataclass(frozen=True)
class Peaks:
    """Bytes allocated when a step began, and each phase's peak above them."""

    held: int | None  # None on a CPU
    above: dict[str, int]


def highest(watches: list[PhaseTimer]) -> Peaks:
    """Of several steps on a GPU: each phase's highest."""
    found = [{name: peak - timer.held for name, peak in timer.peaks.items()} for timer in watches]
    return Peaks(max(timer.held for timer in watches), {name: max(each[name] for each in found) for name in found[0]})


def phase_peaks(work: Callable[[PhaseTimer], Any], device: torch.device) -> Peaks:
    """Each phase's peak above what was allocated before the step, in a pass that is not timed.

    On a CPU it is the running sum of the profiler's allocations between a phase's beginning and its end.
    """
    if device.type == "cuda":
        timer = PhaseTimer(device)
        work(timer)
        return highest([timer])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work(PhaseTimer(device))
    spans = [
        (event.name().removeprefix(MARK), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profile.profiler.kineto_results.events()
        if event.name().startswith(MARK)
    ]
    return Peaks(None, peaks_within(measure.allocations(profile), spans))


def peaks_within(changes: list[tuple[int, int]], spans: list[tuple[str, int, int]]) -> dict[str, int]:
    """The highest running sum of `(when, bytes)` within each `(name, from, to)`, with what was there when it began."""
    times = [when for when, _ in changes]
    sums = list(accumulate((size for _, size in changes), initial=0))  # sums[i]: before change i
    peaks: dict[str, int] = {}
    for name, start, stop in spans:
        peak = max(sums[bisect_left(times, start) : bisect_right(times, stop) + 1])
        peaks[name] = max(peaks.get(name, 0), peak)
    return peaks
