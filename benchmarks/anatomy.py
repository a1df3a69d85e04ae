"""What a benchmark is: its cases, inputs, candidates, truth, bars and counted work, as one record.

The engine (`cases.py`) knows these records and no benchmark; a benchmark is a value in `suite/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.shapes import ROTATE_BELOW, Shape, Shapes

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]  # the outputs of a mode, in its order

OURS, EAGER = "onecard", "eager"


class Unavailable(Exception):
    """The candidate cannot run here; the message says why."""


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
    """One way of calling: which outputs it has, and which inputs get a gradient."""

    about: str
    outputs: tuple[str, ...]
    work: Callable[[Shape, int], Work]  # of a shape, at so many bytes an element
    gradients: Mapping[str, str] = field(default_factory=dict)  # name of the output -> input it is the gradient of
    tracked: tuple[str, ...] = ()  # inputs that ask for a gradient although no backward is run
    seed: str = "grad"  # input: what a loss sends back to the first output

    @property
    def results(self) -> tuple[str, ...]:
        return (*self.outputs, *self.gradients)


@dataclass(frozen=True)
class Candidate:
    """Someone who is timed. `load` raises Unavailable with the reason that then stands in the table."""

    name: str
    load: Callable[[torch.device], Function]
    role: str = "peer"  # ours | peer
    modes: tuple[str, ...] | None = None  # None: all
    devices: tuple[str, ...] | None = None
    slow_start: bool = False  # compiles for a while: left out of --quick, and of all shapes but the first
    around: Callable[[], AbstractContextManager[object]] = nullcontext  # settings in which it runs
    prepare: Callable[[Inputs], Inputs] | None = None  # before each call, outside of its time and memory


@dataclass(frozen=True)
class Truth:
    """fp64, from the very inputs the candidates get (bf16 inputs are exact in fp64)."""

    value: Tensor
    at: Tensor | None = None  # rows of the output that are compared; None: all


@dataclass(frozen=True)
class Bar:
    """How the error of an output is taken, and how large it may be."""

    error: Callable[[Tensor, Tensor], float]
    ours: Mapping[torch.dtype, float] | None = None  # by the inputs' dtype; None: twice eager's error in this very case
    peer: float = math.inf  # beyond it a peer is broken here, or called wrongly by us: no time either way


@dataclass(frozen=True)
class Benchmark:
    name: str
    about: str
    axes: str  # of its shapes, as the heading says them
    modes: Mapping[str, Mode]
    shapes: Mapping[str, Shapes]  # by device
    dtypes: Mapping[str, torch.dtype]
    inputs: Callable[[Shape, torch.device, torch.dtype, int], Inputs]  # the last one is the seed
    truth: Callable[[Inputs, Collection[str]], dict[str, Truth]]  # of the results asked for
    bars: Mapping[str, Bar]  # by result
    candidates: tuple[Candidate, ...]
    launches: bool = False  # count kernel launches, where they are what the time is made of


def input_sets(benchmark: Benchmark, shape: Shape, device: torch.device) -> list[Inputs]:
    """One set of inputs, or two that take turns when one might stay in a cache from call to call."""
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
