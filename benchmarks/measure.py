"""Stopwatch, interleaved rounds, quartiles, peak memory, launches, and the works that are the limits.

A work is a function without arguments.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from resource import struct_rusage

import torch

ROOT = Path(__file__).resolve().parent.parent

Work = Callable[[], object]  # with a method `ready()`, it is called before each call, outside of time and memory

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler announces every memory pass on stderr


@dataclass(frozen=True)
class Spread:
    """Median and quartiles. A few calls that another process disturbed do not move them."""

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


def ready(work: Work) -> None:
    prepare = getattr(work, "ready", None)
    if prepare is not None:
        prepare()


def stopwatch(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Callable[[Work], float]:
    """Return a function that runs a work and returns its seconds."""

    def host(work: Work) -> float:
        ready(work)
        start = clock()
        result = work()
        seconds = clock() - start
        del result  # freeing the result is outside of the time, on both devices
        return seconds

    def cuda(work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready(work)
        torch.cuda.synchronize(device)
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize(device)
        del result
        return start.elapsed_time(end) / 1e3  # milliseconds

    return cuda if device.type == "cuda" else host


LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """How many rounds, and by which clock. After `budget` seconds of calls no round begins beyond the `least`."""

    repeats: int
    warmup: int = 0
    budget: float = math.inf
    least: int = LEAST_ROUNDS
    clock: Callable[[], float] = time.perf_counter


def interleave(
    works: Mapping[str, Sequence[Work]],
    device: torch.device,
    timing: Timing,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each round A B C A B C ...: what slows the machine for a minute slows all, and ratios hold.

    A work comes as its variants (one per set of inputs). Every call takes another variant than the call before it, so
    that no work finds its inputs in a cache that its neighbour warmed.
    """
    seconds = stopwatch(device, timing.clock)
    times: dict[str, list[float]] = {name: [] for name in works}
    spent = 0.0
    for turn in range(-timing.warmup, timing.repeats):
        if turn >= timing.least and spent > timing.budget:
            break
        for position, (name, variants) in enumerate(works.items()):
            tick(name)
            taken = seconds(variants[(turn + position) % len(variants)])
            spent += taken
            if turn >= 0:
                times[name].append(taken)
    return times


def peak_bytes(work: Work, device: torch.device) -> int:
    """Peak memory that `work` allocates, above what was allocated before. Never inside a timed pass.

    On CPU it is the running sum of the profiler's allocation events, so it is exact for everything that goes through
    PyTorch's allocator, and blind to what a BLAS library keeps for itself.
    """
    ready(work)
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
    return max(accumulate((change for _, change in allocations(profile)), initial=0))


def allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """(when, bytes) of what was allocated and freed on the CPU, in order."""
    events = profile.profiler.kineto_results.events()
    found = (
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    )
    return sorted(found, key=lambda change: change[0])


def launches(work: Work, device: torch.device) -> int | None:
    """Kernels, copies and fills that the GPU starts in one call. None without a GPU."""
    if device.type != "cuda":
        return None
    ready(work)
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        result = work()
        torch.cuda.synchronize(device)
        del result
    # Annotated regions are shown on the GPU's line too
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_gpu) or None


def run_process(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> tuple[int, float, struct_rusage]:
    """Run a command in the repository's root: its exit code, its seconds, and what it used."""
    with open(log, "wb") as file:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, seconds, usage


def free_memory() -> None:
    """Return freed and cached memory, so that the next case does not meet the fragments of this one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


COPY_BYTES = 512 << 20  # read and written together; far more than most caches hold


def copy_work(device: torch.device) -> tuple[Work, int]:
    """A plain copy and the bytes it moves: the measured bandwidth of this machine."""
    source = torch.randn(COPY_BYTES // 8, device=device)  # half of the bytes, fp32
    target = torch.empty_like(source)
    return lambda: target.copy_(source), COPY_BYTES


LOGITS_BYTES = 2 << 30  # of logits at a time in the bare GEMMs: many thousand tokens, and small cards can run it


def gemm_work(
    hidden: torch.Tensor, weight: torch.Tensor, logits: int, back: int = 0, outer: int = 0
) -> Callable[[], tuple[torch.Tensor | None, ...]]:
    """Bare matrix products of a head into preallocated buffers: the limit of everything built from them.

    So many times each: the logits, the gradient of the hidden states, the gradient of the head.
    """
    hidden, weight = hidden.detach(), weight.detach()
    tokens, chunk = hidden.shape[0], max(1, LOGITS_BYTES // (weight.shape[0] * weight.element_size()))
    buffer = hidden.new_empty(min(tokens, chunk), weight.shape[0])
    d_hidden = torch.empty_like(hidden) if back else None
    d_weight = torch.empty_like(weight) if outer else None

    def run() -> tuple[torch.Tensor | None, ...]:
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]
            slope = buffer[: len(part)]  # stands for the gradient of the logits too: the values do not matter
            for _ in range(logits):
                torch.mm(part, weight.t(), out=slope)
            for _ in range(back):
                torch.mm(slope, weight, out=d_hidden[start : start + chunk])
            for _ in range(outer):
                d_weight.addmm_(slope.t(), part, beta=1 if start else 0)
        return buffer, d_hidden, d_weight

    return run
