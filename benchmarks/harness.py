"""What an operation's benchmark is, and how one case of it is measured.

A case is a shape in a mode. Every candidate is first compared with fp64, then its memory is taken, then all are timed
in turns with each other and with the limits: bare matrix products and a copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.cli import Refused
from benchmarks.measure import Timing
from benchmarks.oracle import Bar, Errors, Expected, Inputs
from benchmarks.records import LIMIT, OURS, Row
from benchmarks.shapes import ROTATE_BELOW, Shape, Shapes

Outputs = dict[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]  # the outputs of a mode, in its order

EAGER, COMPILE = "eager", "torch.compile"
LONG_START = "compiles for long: timed at the first shape alone (--all-shapes: everywhere)"


class Unavailable(Exception):
    """The candidate cannot run here; the message is the reason in its row."""


@dataclass(frozen=True)
class Products:
    """Matrix products between tokens and a head: logits, gradients of the hidden states, gradients of the head."""

    logits: int
    hidden: int = 0
    head: int = 0

    @property
    def count(self) -> int:
        return self.logits + self.hidden + self.head


@dataclass(frozen=True)
class Work:
    """A lower bound: what every correct implementation must compute and move at least once."""

    bytes: int
    flops: int = 0
    products: Products | None = None  # those FLOPs as bare products of `hidden` and `weight`; None: only bytes count


@dataclass(frozen=True)
class Mode:
    """A way of calling an operation: its outputs, and the inputs that get a gradient."""

    about: str
    outputs: tuple[str, ...]
    work: Callable[[Shape, int], Work]  # of a shape, at so many bytes an element
    gradients: Mapping[str, str] = field(default_factory=dict)  # name of the output -> input it is the gradient of
    tracked: tuple[str, ...] = ()  # inputs that require a gradient although no backward is run
    seed: str = "grad"  # input: the gradient of the first output

    @property
    def results(self) -> tuple[str, ...]:
        return (*self.outputs, *self.gradients)


@dataclass(frozen=True)
class Candidate:
    """`load` returns the function, or raises Unavailable.

    `role` "setting": one of ours that may be wrong; it is then not timed, and has the reason in its row.
    """

    name: str
    load: Callable[[torch.device], Function]
    role: str = "peer"  # ours | peer | setting
    modes: tuple[str, ...] | None = None  # None: all
    devices: tuple[str, ...] | None = None
    slow_start: bool = False  # compiles for a while: left out of --quick, and of all shapes but the first
    around: Callable[[], AbstractContextManager[object]] = nullcontext  # settings in which it runs
    prepare: Callable[[Inputs], Inputs] | None = None  # before each call, outside of its time and memory


@dataclass(frozen=True)
class Benchmark:
    name: str
    about: str
    modes: Mapping[str, Mode]
    shapes: Mapping[str, Shapes]  # by device
    dtypes: Mapping[str, torch.dtype]
    inputs: Callable[[Shape, torch.device, torch.dtype, int], Inputs]  # the last one is the seed
    expected: Callable[[Inputs, Collection[str]], dict[str, Expected]]  # of the results asked for
    bars: Mapping[str, Bar]  # by result
    candidates: tuple[Candidate, ...]
    launches: bool = False  # count kernel launches


def input_sets(benchmark: Benchmark, shape: Shape, device: torch.device) -> list[Inputs]:
    """One set of inputs, or two that take turns where one might stay in a cache from call to call."""
    dtype = benchmark.dtypes[device.type]
    first = benchmark.inputs(shape, device, dtype, 0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    return [first] if size >= ROTATE_BELOW else [first, benchmark.inputs(shape, device, dtype, 1)]


def run(function: Function, inputs: Inputs, mode: Mode) -> Outputs:
    """One call in one mode."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in (*mode.gradients.values(), *mode.tracked)}
    with torch.set_grad_enabled(bool(leaves)):
        values = function({**inputs, **leaves})
        outputs = dict(zip(mode.outputs, values, strict=True))
        if mode.gradients:
            wanted = [leaves[name] for name in mode.gradients.values()]
            found = torch.autograd.grad(values[0], wanted, inputs[mode.seed].to(values[0].dtype))
            outputs.update(zip(mode.gradients, found, strict=True))
    return {name: value.detach() for name, value in outputs.items()}


class Job:
    """A candidate's call with one set of inputs."""

    def __init__(self, candidate: Candidate, function: Function, inputs: Inputs, mode: Mode) -> None:
        self.candidate, self.function, self.inputs, self.mode = candidate, function, inputs, mode
        self.given: Inputs | None = None

    def ready(self) -> None:
        """Make the inputs of the next call. They are not freed by it: they are no part of its memory."""
        self.given = None
        self.given = self.candidate.prepare(self.inputs) if self.candidate.prepare else self.inputs

    def __call__(self) -> Outputs:
        with self.candidate.around():
            return run(self.function, self.given or self.inputs, self.mode)


def errors_of(outputs: Outputs, expected: Mapping[str, Expected], bars: Mapping[str, Bar]) -> Errors:
    def compared(name: str, value: Tensor) -> Tensor:
        at = expected[name].at
        return value if at is None else value[at]

    return {name: bars[name].error(compared(name, value), expected[name].value) for name, value in outputs.items()}


class Check:
    """Compares candidates with fp64."""

    def __init__(self, benchmark: Benchmark, mode: str, inputs: Inputs, expected: Mapping[str, Expected]) -> None:
        self.benchmark, self.mode, self.inputs, self.expected = benchmark, mode, inputs, expected
        self.device = next(iter(inputs.values())).device
        self.eager: Errors = {}

    def bar(self, candidate: Candidate, name: str) -> float:
        bar = self.benchmark.bars[name]
        if candidate.role == "peer":
            return bar.peer
        return bar.of_ours(self.eager.get(name), self.benchmark.dtypes[self.device.type])

    def __call__(self, candidate: Candidate) -> tuple[Function, Errors]:
        """Run a candidate once at full size. Raises Unavailable with the reason for its row, or Refused for ours."""
        try:
            function = candidate.load(self.device)
            job = Job(candidate, function, self.inputs, self.benchmark.modes[self.mode])
            job.ready()
            errors = errors_of(job(), self.expected, self.benchmark.bars)
        except Unavailable:
            raise
        except Exception as error:  # whatever a peer raises is the reason in its row
            raise Unavailable(one_line(error)) from error
        if candidate.name == EAGER:
            self.eager = errors
        wrong = "; ".join(
            f"{name}: error {value:.2g} against fp64, bar {self.bar(candidate, name):.2g}"
            for name, value in errors.items()
            if not value <= self.bar(candidate, name)  # NaN is never within a bar
        )
        if wrong and candidate.role == "ours":
            raise Refused(f"{candidate.name} is wrong in {self.benchmark.name}, mode {self.mode}: {wrong}.")
        if wrong:
            raise Unavailable(f"WRONG, not timed: {wrong}")
        return function, errors


def limits(
    benchmark: Benchmark, sets: Sequence[Inputs], work: Work, device: torch.device
) -> list[tuple[Row, list[measure.Work], int]]:
    """Rows without times, works, and FLOPs or bytes of one call: bare GEMMs where there are any, and a copy."""
    copy, moved = measure.copy_work(device)
    found: list[tuple[Row, list[measure.Work], int]] = [(Row("copy", LIMIT), [copy], moved)]
    if (of := work.products) is not None:
        row = Row(f"bare GEMMs, {of.count}u", LIMIT, gemms=of.count)
        bare = [measure.gemm_work(s["hidden"], s["weight"], of.logits, of.hidden, of.head) for s in sets]
        found.insert(0, (row, [*bare], work.flops))
    return found


def measure_case(
    benchmark: Benchmark,
    shape: Shape,
    mode: str,
    candidates: Sequence[Candidate],
    device: torch.device,
    timing: Timing,
    *,
    main: bool = True,
    tick: Callable[[str], None] = lambda name: None,
) -> tuple[Row, ...]:
    """Check all candidates, take their memory, time them in turns. `main`: also time what compiles for long."""
    tick("inputs and fp64 oracle")
    sets = input_sets(benchmark, shape, device)
    expected = benchmark.expected(sets[0], benchmark.modes[mode].results)
    chosen = [c for c in candidates if mode in (c.modes or (mode,)) and device.type in (c.devices or (device.type,))]
    check = Check(benchmark, mode, sets[0], expected)
    rows: dict[str, Row] = {}
    works: dict[str, list[measure.Work]] = {}
    # Eager comes first: its error is the yardstick of our gradients. The table keeps the given order.
    for candidate in sorted(chosen, key=lambda c: c.name != EAGER):
        tick(candidate.name)
        row = Row(candidate.name, "ours" if candidate.role == "setting" else candidate.role)
        try:
            if candidate.slow_start and not main:
                raise Unavailable(LONG_START)
            function, errors = check(candidate)
            jobs = [Job(candidate, function, inputs, benchmark.modes[mode]) for inputs in sets]
            peak = measure.peak_bytes(jobs[0], device)
        except Unavailable as error:
            if candidate.name == OURS:
                raise Refused(f"{benchmark.name} does not run in mode {mode} at {shape}: {error}") from error
            rows[candidate.name] = replace(row, reason=str(error))
            measure.free_memory()  # an allocation that failed leaves fragments
            continue
        launches = measure.launches(jobs[0], device) if benchmark.launches else None
        rows[candidate.name] = replace(row, errors=errors, peak_bytes=peak, launches=launches)
        works[candidate.name] = list(jobs)
    work = benchmark.modes[mode].work(shape, benchmark.dtypes[device.type].itemsize)
    bare = limits(benchmark, sets, work, device)
    for row, made, _ in bare:
        made[0]()  # the candidates have all run by now
        works[row.name] = made
    times = measure.interleave(works, device, timing, tick)
    done = [replace(rows[c.name], seconds=tuple(times.get(c.name, ()))) for c in chosen]
    for row, _, units in bare:
        seconds = times[row.name]
        done.append(replace(row, seconds=tuple(seconds), rate=units / measure.spread(seconds).median))
    return with_share(done, work)


def with_share(rows: Sequence[Row], work: Work) -> tuple[Row, ...]:
    """Add the share of the limit: the time of the unavoidable work at the rates just measured, over the time taken."""
    least = max((work.flops if row.gemms else work.bytes) / row.rate for row in rows if row.role == LIMIT and row.rate)
    return tuple(
        replace(row, of_limit=least / row.time.median) if row.time is not None and row.name != "copy" else row
        for row in rows
    )


# --- candidates of several operations. They import in `load`: a peer that is not installed costs its row alone.

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], targets [N] -> [N]


def attribute(module: str, name: str) -> Any:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a broken import of a peer is a reason for its row, not an end of the run
        raise Unavailable(one_line(error)) from error
    if found is None:
        raise Unavailable(f"{module} has no {name}")
    return found


def one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit]


def takes(function: Callable[..., Any], names: Sequence[str], count: int = 1) -> Function:
    """`function` of tensors as one of inputs; the first `count` of what it returns are the outputs."""

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        result = function(*(inputs[name] for name in names))
        return (result,) if isinstance(result, Tensor) else tuple(result[:count])

    return call


def ours(name: str, call: Callable[[Callable[..., Any]], Function]) -> Candidate:
    """The public function `name` with its defaults; `call` says how it is called."""
    return Candidate(OURS, lambda device: call(attribute("onecard_kernels", name)), role="ours")


def plain(function: Callable[..., Any], names: Sequence[str], count: int = 1) -> tuple[Candidate, Candidate]:
    """A formula in eager PyTorch, and the same lines compiled for the exact shape.

    What it returns after the outputs (metrics) is dropped outside, so that the compiler cannot leave it out.
    """

    def compiled(device: torch.device) -> Function:
        torch._dynamo.reset()  # every case compiles anew: its shapes are constants, and no recompilation limit is met
        return takes(torch.compile(function, fullgraph=True, dynamic=False), names, count)

    eager = Candidate(EAGER, lambda device: takes(function, names, count))
    return eager, Candidate(COMPILE, compiled, slow_start=True)


def absent(name: str, reason: str) -> Candidate:
    """A peer that one would look for, with the reason why it is not timed."""

    def load(device: torch.device) -> Function:
        raise Unavailable(reason)

    return Candidate(name, load)


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """A trainer without a fused loss; the softmax is in fp32."""
    logits = hidden @ weight.t()
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)


def trl_logprobs() -> LogProbs:
    """TRL's call in `add_fused_lm_head`, argument for argument, with none of the optional outputs."""
    function = attribute("trl.kernels", "ChunkedLogProbFunction")
    chunk = attribute("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        bias, temperature, softcap, logit_scale = None, 1.0, None, 1.0
        outputs = ("log_probs",)
        return function.apply(hidden, weight, bias, targets, temperature, chunk, softcap, logit_scale, outputs)[0]

    return logprobs
