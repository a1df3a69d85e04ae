"""A pass of fixed shapes, recorded once and replayed: the GPU is told once what to do, not layer by layer each time.

A step of sampling is a thousand small kernels, and Python takes longer to start them than a large GPU to run them.
Rows that keep their places (`slots.py`) give every step the same shapes and addresses until the cache grows or rows
leave; then it is recorded anew.

Off unless ONECARD_ROLLOUT_GRAPHS=1: it has not been measured on a GPU yet. Where recording fails, passes run as before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from onecard.utils.errors import is_out_of_memory
from onecard.utils.progress import say

Inputs = dict[str, Tensor]
Pass = Callable[[Inputs], Tensor]
Recorder = Callable[[Pass, Inputs], Pass]  # -> the same pass, for other numbers in inputs of the same shapes
WARMUPS = 2  # passes before recording: libraries make their workspaces in the first

_recorders: list[Recorder | None] = []


@contextmanager
def recorded_by(recorder: Recorder | None) -> Iterator[None]:
    """Inside, sampling's passes are recorded by it; None: they are not."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


def recorder_for(device: torch.device) -> Recorder | None:
    """What records passes on a device, if anything."""
    if _recorders:
        return _recorders[-1]
    wanted = device.type == "cuda" and os.environ.get("ONECARD_ROLLOUT_GRAPHS") == "1"
    return cuda_graph if wanted else None


def cuda_graph(run: Pass, inputs: Inputs) -> Pass:
    """A pass as a CUDA graph. It runs a few times here, and writes what it would write.

    `inputs` stay where they are: a replay copies new numbers into them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(inputs)

    def replay(new: Inputs) -> Tensor:
        for name, batch in inputs.items():
            batch.copy_(new[name])
        graph.replay()
        return out.clone()

    return replay


class Replayed:
    """Passes, recorded anew whenever `shape` changes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder
        self.shape: tuple[int, ...] | None = None
        self.replay: Pass | None = None

    def __call__(self, run: Pass, inputs: Inputs, shape: tuple[int, ...]) -> Tensor:
        if shape != self.shape:
            self.shape, self.replay = shape, None  # a recording keeps the memory of its pass
            self.replay = self.record(run, inputs)
        return run(inputs) if self.replay is None else self.replay(inputs)

    def forget(self) -> None:
        """The memory that was recorded is no longer there."""
        self.shape = self.replay = None

    def record(self, run: Pass, inputs: Inputs) -> Pass | None:
        if self.recorder is None:
            return None
        try:
            return self.recorder(run, inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.recorder = None
            say(f"sampling goes on without a recorded pass: {str(error).splitlines()[0][:160]}")
            return None
