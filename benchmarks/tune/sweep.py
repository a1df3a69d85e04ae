"""One case of a knob, a shape: every setting is checked, then what is right is timed in turns with the default."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import anatomy, measure, truth
from benchmarks.anatomy import EAGER, OURS, Benchmark, Candidate, Inputs, Outputs, Truth, Unavailable
from benchmarks.candidates import one_line
from benchmarks.cases import Job, Refused, Timing, checked, free, limits, timed, with_share
from benchmarks.records import Row
from benchmarks.shapes import Shape
from benchmarks.tune.knobs import Knob, label_of
from benchmarks.tune.turning import Values

CALLS = 20  # of a CUDA graph
PART = 1 << 26  # numbers compared at a time: the fp64 copies of a gradient of logits would not fit
LATE = "not tried: the time was over"


class Replayed:
    """Many calls of a job as one CUDA graph: the time of its kernels, without that of starting them one by one."""

    def __init__(self, job: Job) -> None:
        self.graph = torch.cuda.CUDAGraph()
        job.ready()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # what is allocated or compiled at the first call is none of the graph's
            job()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(self.graph):
            for _ in range(CALLS):
                job()

    def __call__(self) -> None:
        self.graph.replay()


@dataclass(frozen=True)
class Case:
    """What all settings of a knob share at a shape."""

    knob: Knob
    benchmark: Benchmark
    device: torch.device
    sets: Sequence[Inputs]
    true: dict[str, Truth]
    eager: truth.Errors | None
    outputs: Outputs  # the default's

    @property
    def inputs(self) -> Inputs:
        return self.sets[0]

    def objections(self, outputs: Outputs, errors: truth.Errors) -> list[str]:
        """Why a result is wrong: against fp64, by the default's own bars; and against the default, in all rows."""
        dtype = self.benchmark.dtypes[self.device.type]
        found = truth.objections(self.benchmark, errors, self.eager, dtype)
        for name, error in difference(self.benchmark, outputs, self.outputs).items():
            # Two results that are both right may lie so far apart
            bar = 2 * truth.bar_of(self.benchmark, name, self.eager, dtype)
            if not error <= bar:
                found.append(f"{name}: {error:.2g} from the default's, bar {bar:.2g}")
        return found


def difference(benchmark: Benchmark, found: Outputs, other: Outputs) -> truth.Errors:
    """The largest difference of each result, as its bar takes it."""
    errors = {}
    for name, value in found.items():
        rows = max(1, PART // max(1, value[0].numel())) if value.dim() else 1
        pairs = zip(value.split(rows), other[name].split(rows), strict=True) if value.dim() else [(value, other[name])]
        worst = [benchmark.bars[name].error(one, two.double()) for one, two in pairs]
        errors[name] = math.nan if any(map(math.isnan, worst)) else max(worst)
    return errors


def candidate_of(knob: Knob, values: Values) -> Candidate:
    """The public function with its defaults, run while the knob is turned."""
    default = next(c for c in knob.benchmark.candidates if c.name == OURS)
    return replace(default, name=label_of(values) or OURS, around=lambda: knob.turn(values))


def eager_errors(
    benchmark: Benchmark, mode: str, inputs: Inputs, true: dict[str, Truth], device: torch.device
) -> truth.Errors | None:
    """The yardstick of our gradients; None where eager does not run."""
    eager = next(c for c in benchmark.candidates if c.name == EAGER)
    try:
        return checked(benchmark, eager, inputs, mode, true, None, device)[1]
    except Unavailable:
        return None
    finally:
        free(device)


def tried(case: Case, candidate: Candidate) -> truth.Errors:
    """Runs a setting once. Raises Unavailable with the reason if it does not run, or is wrong."""
    how = case.benchmark.modes[case.knob.mode]
    try:
        job = Job(candidate, candidate.load(case.device), case.inputs, how)
        job.ready()
        outputs = job()
        errors = truth.errors_of(outputs, case.true, case.benchmark.bars)
        wrong = case.objections(outputs, errors)
    except Exception as error:  # too much shared memory, out of memory, no code for it: that is the answer
        free(case.device)  # of what it held when it failed
        raise Unavailable(f"does not run: {one_line(error)}") from error
    if wrong:
        raise Unavailable(f"WRONG, not timed: {'; '.join(wrong)}")
    return errors


def opened(knob: Knob, shape: Shape, device: torch.device) -> tuple[Case, truth.Errors]:
    """The case, once the default has been found right against fp64. Raises Refused if it is not."""
    benchmark, mode = knob.benchmark, knob.mode
    sets = anatomy.input_sets(benchmark, shape, device)
    true = benchmark.truth(sets[0], benchmark.modes[mode].results)
    eager = eager_errors(benchmark, mode, sets[0], true, device)
    default = candidate_of(knob, {})
    try:
        function, errors = checked(benchmark, default, sets[0], mode, true, eager, device)
    except Unavailable as reason:
        raise Refused(f"{knob.name}: the default does not run at {shape}: {reason}") from reason
    job = Job(default, function, sets[0], benchmark.modes[mode])
    job.ready()
    return Case(knob, benchmark, device, sets, true, eager, job()), errors


def measure_case(
    knob: Knob,
    shape: Shape,
    settings: Sequence[Values],
    device: torch.device,
    timing: Timing,
    *,
    late: Callable[[], bool] = lambda: False,
    tick: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """A row for the default, one for each setting, and the limits. What is wrong or does not run has its reason alone.

    Once it is `late`, no further setting is tried; those that were are timed.
    """
    tick("inputs and fp64 truth")
    case, errors = opened(knob, shape, device)
    mode = case.benchmark.modes[knob.mode]
    blank = Row(shape.name, dict(shape.sizes), knob.mode, candidate="", role="ours")
    rows: dict[str, Row] = {}
    works: dict[str, list[measure.Work]] = {}
    calls = CALLS if knob.replayed and device.type == "cuda" else 1
    for values in ({}, *settings):
        candidate = candidate_of(knob, values)
        row = replace(blank, candidate=candidate.name)
        tick(candidate.name)
        try:
            if values and late():
                raise Unavailable(LATE)
            if values:
                errors = tried(case, candidate)
            jobs = [Job(candidate, candidate.load(device), inputs, mode) for inputs in case.sets]
            peak = measure.peak_bytes(jobs[0], device)
            works[candidate.name] = list(jobs) if calls == 1 else [captured(job) for job in jobs]
        except Exception as error:  # out of memory, for one, may also come later than at the first call
            rows[candidate.name] = replace(
                row, reason=str(error) if isinstance(error, Unavailable) else one_line(error)
            )
            continue
        rows[candidate.name] = replace(row, errors=errors, peak_bytes=peak)
    work = mode.work(shape, case.benchmark.dtypes[device.type].itemsize)
    bare = limits(case.benchmark, blank, case.sets, work, device)
    for _, made, _ in bare.values():
        made[0]()
    times = measure.interleave(
        {**works, **{name: made for name, (_, made, _) in bare.items()}},
        measure.stopwatch(device, timing.clock),
        repeats=timing.repeats,
        warmup=timing.warmup,
        budget=timing.budget,
        tick=tick,
    )
    done = [timed(row, each(times.get(name), calls)) for name, row in rows.items()]
    return with_share(done + [timed(row, times[name], units) for name, (row, _, units) in bare.items()], work)


def captured(job: Job) -> Replayed:
    try:
        return Replayed(job)
    except Exception as error:
        raise Unavailable(f"cannot be captured as a CUDA graph: {one_line(error)}") from error


def each(seconds: list[float] | None, calls: int) -> list[float] | None:
    return None if seconds is None else [taken / calls for taken in seconds]
