"""One case, a shape in a mode: everybody is checked, then weighed, then timed in turns with everybody else."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import torch

from benchmarks import anatomy, measure, truth
from benchmarks.anatomy import EAGER, OURS, Benchmark, Candidate, Function, Inputs, Mode, Truth, Unavailable
from benchmarks.candidates import one_line
from benchmarks.records import LIMIT, Row
from benchmarks.shapes import Shape

LONG_START = "compiles for long: timed at the first shape alone (--all-shapes: everywhere)"


class Refused(Exception):
    """Ours is wrong, or does not run: there is nothing to time."""


def closing(results: Iterable[Any], left_out: int, minutes: float | None) -> None:
    """The last words of a run over cases; raises Refused for those with nothing to time."""
    if left_out:
        click.echo(f"{left_out} cases were not begun after {minutes:g} minutes.")
    refused = [f"{result.name}: {result.refused}" for result in results if result.refused]
    if refused:
        raise Refused(" ".join(refused))


@dataclass(frozen=True)
class Timing:
    """How often, for how long, and by which clock."""

    repeats: int
    warmup: int = 0
    budget: float = math.inf  # seconds of a case's timed rounds
    clock: Callable[[], float] = time.perf_counter


class Job:
    """A candidate's call with one set of inputs, as the instruments take it."""

    def __init__(self, candidate: Candidate, function: Function, inputs: Inputs, mode: Mode) -> None:
        self.candidate, self.function, self.inputs, self.mode = candidate, function, inputs, mode
        self.given: Inputs | None = None

    def ready(self) -> None:
        """Not freed by the call: what was allocated before it is none of its memory."""
        self.given = None
        self.given = self.candidate.prepare(self.inputs) if self.candidate.prepare else self.inputs

    def __call__(self) -> anatomy.Outputs:
        with self.candidate.around():
            return anatomy.run(self.function, self.given or self.inputs, self.mode)


def checked(
    benchmark: Benchmark,
    candidate: Candidate,
    inputs: Inputs,
    mode: str,
    true: Mapping[str, Truth],
    eager: truth.Errors | None,
    device: torch.device,
) -> tuple[Function, truth.Errors]:
    """Runs a candidate once at full size and compares it with fp64. Raises Unavailable, or Refused for ours."""
    try:
        function = candidate.load(device)
        job = Job(candidate, function, inputs, benchmark.modes[mode])
        job.ready()
        errors = truth.errors_of(job(), true, benchmark.bars)
    except Unavailable:
        raise
    except Exception as error:  # whatever a peer raises is the reason in its row
        raise Unavailable(one_line(error)) from error
    if candidate.role != "ours":
        wrong = truth.peer_objection(benchmark, errors)
        if wrong is not None:
            raise Unavailable(wrong)
    else:
        objections = truth.objections(benchmark, errors, eager, benchmark.dtypes[device.type])
        if objections:
            raise Refused(f"{candidate.name} is wrong in {benchmark.name}, mode {mode}: {'; '.join(objections)}.")
    return function, errors


def limits(
    benchmark: Benchmark, blank: Row, sets: Sequence[Inputs], work: anatomy.Work, device: torch.device
) -> dict[str, tuple[Row, list[measure.Work], int]]:
    """name -> (row without times, works, FLOPs or bytes of one call): bare GEMMs where there are any, and a copy."""
    found: dict[str, tuple[Row, list[measure.Work], int]] = {}
    if work.products is not None:
        of = work.products
        row = replace(blank, candidate=f"bare GEMMs, {of.count}u", role=LIMIT, gemms=of.count)
        bare = [measure.gemm_work(s["hidden"], s["weight"], of.logits, of.hidden, of.head) for s in sets]
        found[row.candidate] = (row, list(bare), work.flops)
    copy, moved = measure.copy_work(device)
    found["copy"] = (replace(blank, candidate="copy", role=LIMIT), [copy], moved)
    return found


def measure_case(
    benchmark: Benchmark,
    shape: Shape,
    mode: str,
    sets: Sequence[Inputs],
    true: Mapping[str, Truth],
    chosen: Sequence[Candidate],
    timing: Timing,
    *,
    main: bool = True,
    tick: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Checks everybody, then takes the memory of everybody, then times everybody in turns.

    `main`: what compiles for long is timed here too.
    """
    inputs, how = sets[0], benchmark.modes[mode]
    device = next(iter(inputs.values())).device
    blank = Row(shape.name, dict(shape.sizes), mode, candidate="", role="peer")
    taking_part = [c for c in chosen if mode in (c.modes or (mode,)) and device.type in (c.devices or (device.type,))]
    rows: dict[str, Row] = {}
    works: dict[str, list[measure.Work]] = {}
    eager: truth.Errors | None = None
    # Eager comes first: its error is the yardstick of our gradients. The table keeps the order of `chosen`.
    for candidate in sorted(taking_part, key=lambda candidate: candidate.name != EAGER):
        name = candidate.name
        tick(name)
        row = replace(blank, candidate=name, role=candidate.role)
        try:
            if candidate.slow_start and not main:
                raise Unavailable(LONG_START)
            function, errors = checked(benchmark, candidate, inputs, mode, true, eager, device)
        except Unavailable as reason:
            if name == OURS:
                raise Refused(f"{benchmark.name} does not run in mode {mode} at {shape}: {reason}") from reason
            rows[name] = replace(row, reason=str(reason))
            free(device)  # an allocation that failed leaves fragments
            continue
        eager = errors if name == EAGER else eager
        works[name] = [Job(candidate, function, inputs, how) for inputs in sets]
        rows[name] = replace(
            row,
            errors=errors,
            peak_bytes=measure.peak_bytes(works[name][0], device),
            launches=measure.launches(works[name][0], device) if benchmark.launches else None,
        )
    work = how.work(shape, benchmark.dtypes[device.type].itemsize)
    bare = limits(benchmark, blank, sets, work, device)
    for _, made, _ in bare.values():
        made[0]()  # the candidates have all run by now
    ordered = {candidate.name: works[candidate.name] for candidate in taking_part if candidate.name in works}
    times = measure.interleave(
        {**ordered, **{name: made for name, (_, made, _) in bare.items()}},
        measure.stopwatch(device, timing.clock),
        repeats=timing.repeats,
        warmup=timing.warmup,
        budget=timing.budget,
        tick=tick,
    )
    done = [timed(rows[candidate.name], times.get(candidate.name)) for candidate in taking_part]
    return with_share(done + [timed(row, times[name], units) for name, (row, _, units) in bare.items()], work)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or the next candidate pays for the last one's fragments


def timed(row: Row, seconds: list[float] | None, units: int | None = None) -> Row:
    if seconds is None:
        return row
    found = measure.spread(seconds)
    rate = None if units is None else units / found.median
    return replace(row, seconds=tuple(seconds), median=found.median, q1=found.q1, q3=found.q3, rate=rate)


def with_share(rows: list[Row], work: anatomy.Work) -> list[Row]:
    """Adds the share of the limit: the time of the unavoidable work at the rates just measured, over the time taken."""
    least = work.bytes / next(row.rate for row in rows if row.role == LIMIT and not row.gemms)
    least = max([least, *(work.flops / row.rate for row in rows if row.gemms)])
    return [
        replace(row, of_limit=least / row.median) if row.median is not None and row.candidate != "copy" else row
        for row in rows
    ]
