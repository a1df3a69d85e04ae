"""The instruments: a stopwatch, interleaved repetitions, quartiles, and the peak of allocated memory.

Nothing here knows what is measured: works are functions without arguments.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], object]

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler announces every memory pass on stderr


@dataclass(frozen=True)
class Spread:
    """Median and quartiles: means and standard deviations are ruled by the few calls that another process disturbed."""

    median: float
    q1: float
    q3: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    if not values:
        raise ValueError("spread needs at least one value")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, len(values))


def stopwatch(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Callable[[Work], float]:
    """A function that runs a work and returns the seconds it took."""

    def host(work: Work) -> float:
        start = clock()
        result = work()
        seconds = clock() - start
        del result  # freeing the result is outside of the time, on both devices
        return seconds

    def cuda(work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize(device)
        del result
        return start.elapsed_time(end) / 1e3  # milliseconds

    return cuda if device.type == "cuda" else host


def interleave(
    works: Mapping[str, Sequence[Work]],
    seconds: Callable[[Work], float],
    *,
    repeats: int,
    warmup: int = 0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Times A B C A B C ..., so that a slow minute of the machine falls on all of them and ratios within a round hold.

    A work comes as its variants (one per set of inputs). Every call takes another variant than the call before it, so
    that no work finds its inputs in a cache that its neighbour warmed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-warmup, repeats):
        for position, (name, variants) in enumerate(works.items()):
            tick(name)
            taken = seconds(variants[(turn + position) % len(variants)])
            if turn >= 0:
                times[name].append(taken)
    return times


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most memory allocated at once while `work` runs, above what was allocated before. Never inside a timed pass.

    On CPU it is the running sum of the profiler's allocation events, so it is exact for everything that goes through
    PyTorch's allocator, and blind to what a BLAS library keeps for itself.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
        del result
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    return highest([change for _, change in sorted(changes, key=lambda item: item[0])])


def highest(changes: Sequence[int]) -> int:
    """The peak of a running sum that starts at zero."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


COPY_BYTES = 512 << 20  # read and written together; far more than most caches hold


def copy_work(device: torch.device) -> tuple[Work, int]:
    """A plain copy and the bytes it moves: the bandwidth that this machine gives, not the one in its datasheet."""
    source = torch.randn(COPY_BYTES // 8, device=device)  # half of the bytes, fp32
    target = torch.empty_like(source)
    return lambda: target.copy_(source), COPY_BYTES


LOGITS_BYTES = 2 << 30  # of logits at a time in the bare GEMMs: many thousand tokens, and small cards can run it


def gemm_work(hidden: torch.Tensor, weight: torch.Tensor, gemms: int) -> Callable[[], tuple[torch.Tensor | None, ...]]:
    """The bare matrix products of a head into buffers that exist already: the limit of everything built from them.

    1: logits. 2: and the gradient of the hidden states. 3: and the gradient of the head.
    """
    hidden, weight = hidden.detach(), weight.detach()
    tokens, chunk = hidden.shape[0], max(1, LOGITS_BYTES // (weight.shape[0] * weight.element_size()))
    logits = hidden.new_empty(min(tokens, chunk), weight.shape[0])
    d_hidden = torch.empty_like(hidden) if gemms > 1 else None
    d_weight = torch.empty_like(weight) if gemms > 2 else None

    def run() -> tuple[torch.Tensor | None, ...]:
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]
            slope = logits[: len(part)]  # stands for the gradient of the logits too: the values do not matter
            torch.mm(part, weight.t(), out=slope)
            if d_hidden is not None:
                torch.mm(slope, weight, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                d_weight.addmm_(slope.t(), part, beta=1 if start else 0)
        return logits, d_hidden, d_weight

    return run
