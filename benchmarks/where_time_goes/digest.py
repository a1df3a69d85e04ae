"""A profile as a few numbers: operators by self time, products, launches, and how long anything ran at all.

On a GPU an operator is a kernel with the operator that launched it, and what counts is the GPU's own time. On a CPU it
is an operator's self time. Nothing is kept of the profile itself: an iteration on a GPU is a million events.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.train_step.watch import MARK

LAUNCHES = re.compile(r"^(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|MemcpyAsync|MemsetAsync)")
WAITS = re.compile(r"^cuda(Stream|Event)Synchronize")  # a device's synchronisation is the watch's own


@dataclass(frozen=True, slots=True)
class Event:
    """What is read of a profiler's event. Times in ns; `link`: on a GPU, the `key` of the operator that launched it."""

    name: str
    start: int
    stop: int
    thread: int
    on_gpu: bool
    flops: int = 0
    key: int = 0
    link: int = 0


@dataclass(frozen=True)
class Operator:
    """All calls of one operator: seconds, and the FLOPs of its products where they are known."""

    seconds: float = 0.0
    count: float = 0
    flops: float = 0

    def plus(self, seconds: float, count: float, flops: float) -> Operator:
        return Operator(self.seconds + seconds, self.count + count, self.flops + flops)


@dataclass(frozen=True)
class Digest:
    """A profiled piece of work, and the seconds it took. `busy`: those in which at least one operator (GPU: kernel)
    ran.
    """

    operators: dict[str, Operator] = field(default_factory=dict)
    busy: float = 0.0
    launches: int = 0
    synchronisations: int = 0
    seconds: float = 0.0

    @property
    def flops(self) -> float:
        return sum(each.flops for each in self.operators.values())

    def beyond(self, other: Digest) -> Digest:
        """What this work had on top of another."""
        operators = {}
        for name, mine in self.operators.items():
            less = other.operators.get(name, Operator())
            operators[name] = mine.plus(-less.seconds, -less.count, -less.flops)
        return Digest(
            {name: each for name, each in operators.items() if each.seconds > 0},
            max(self.busy - other.busy, 0.0),
            max(self.launches - other.launches, 0),
            max(self.synchronisations - other.synchronisations, 0),
            max(self.seconds - other.seconds, 0.0),
        )


def profiled(work: Callable[[], Any], device: torch.device) -> Digest:
    """The digest of a call. No stacks and no memory are recorded; shapes are, for FLOPs are counted by them."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities, with_flops=True) as profile:
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return replace(digest(read(profile), on_gpu=on_gpu), seconds=seconds)


def read(profile: Any) -> list[Event]:
    """Its events but for what somebody marked: a mark covers what ran inside it, and the time between."""
    found = []
    for event in profile.profiler.kineto_results.events():
        name = event.name()
        if event.is_user_annotation() or name.startswith(MARK) or event.duration_ns() <= 0:
            continue
        on_gpu = event.device_type() == torch.autograd.DeviceType.CUDA
        found.append(
            Event(
                name,
                event.start_ns(),
                event.start_ns() + event.duration_ns(),
                event.device_resource_id() if on_gpu else event.start_thread_id(),
                on_gpu,
                event.flops(),
                event.correlation_id(),
                event.linked_correlation_id(),
            )
        )
    return found


def digest(events: Sequence[Event], *, on_gpu: bool) -> Digest:
    host = [event for event in events if not event.on_gpu]
    runtime = [event.name for event in host if event.name.startswith(("cuda", "cu"))]
    counts = (sum(bool(pattern.match(name)) for name in runtime) for pattern in (LAUNCHES, WAITS))
    if on_gpu:
        kernels = [event for event in events if event.on_gpu]
        return Digest(kernels_by_operator(kernels, host), united(kernels), *counts)
    return Digest(self_times(host), united(host), *counts)


def united(events: Iterable[Event]) -> float:
    """Seconds in which at least one of them ran."""
    total, until = 0, 0
    for event in sorted(events, key=lambda each: each.start):
        total += max(0, event.stop - max(event.start, until))
        until = max(until, event.stop)
    return total / 1e9


def self_times(events: Sequence[Event]) -> dict[str, Operator]:
    """Each operator's time without that of the operators inside it, thread by thread."""
    inside: dict[int, int] = {}  # index -> ns of what it called
    open_: dict[int, list[int]] = {}  # thread -> indices of those that run, the outermost first
    order = sorted(range(len(events)), key=lambda index: (events[index].start, -events[index].stop))
    for index in order:
        event = events[index]
        stack = open_.setdefault(event.thread, [])
        while stack and events[stack[-1]].stop <= event.start:
            stack.pop()
        if stack:
            inside[stack[-1]] = inside.get(stack[-1], 0) + event.stop - event.start
        stack.append(index)
    found: dict[str, Operator] = {}
    for index, event in enumerate(events):
        seconds = max(event.stop - event.start - inside.get(index, 0), 0) / 1e9
        name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        found[name] = found.get(name, Operator()).plus(seconds, 1, event.flops)
    return found


def kernels_by_operator(kernels: Sequence[Event], host: Sequence[Event]) -> dict[str, Operator]:
    """Kernels under `operator: kernel`. FLOPs are the operator's, and go to the first kernel that it launched."""
    launchers = {event.key: event for event in host if event.key and not event.name.startswith("cu")}
    counted: set[int] = set()
    found: dict[str, Operator] = {}
    for kernel in kernels:
        launcher = launchers.get(kernel.link)
        flops = 0
        if launcher is not None and kernel.link not in counted:
            counted.add(kernel.link)
            flops = launcher.flops
        name = f"{launcher.name}: {short(kernel.name)}" if launcher else short(kernel.name)
        found[name] = found.get(name, Operator()).plus((kernel.stop - kernel.start) / 1e9, 1, flops)
    return found


def short(kernel: str) -> str:
    """A kernel's name without its types: templates are longer than a page."""
    plain = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    inner = re.search(r"(\w*(?:Functor|_kernel_cuda|Cat\w+))", plain[plain.find("<") :] if "<" in plain else "")
    head = re.split(r"[<(]", plain)[0].rpartition("::")[2]
    return f"{head} {inner.group(1)}"[:80] if inner and inner.group(1) != head else head[:80]
