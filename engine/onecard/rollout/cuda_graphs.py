"""CUDA graphs for decoding: a forward pass of fixed shapes is captured once and replayed.

A decoding step is about a thousand small kernels, and Python takes longer to launch them than a large GPU to run them.
In `cache_slots.py` every step has the same shapes and addresses until the cache grows or rows are removed; then the
pass is captured again.

Off unless ONECARD_ROLLOUT_GRAPHS=1: it has not been measured on a GPU yet. If the capture fails, passes run without it.
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
Recorder = Callable[[Pass, Inputs], Pass]  # -> the same pass, for new values of inputs of the same shapes
WARMUPS = 2  # passes before the capture: libraries allocate their workspaces in the first

_recorders: list[Recorder | None] = []


@contextmanager
def use_recorder(recorder: Recorder | None) -> Iterator[None]:
    """Context in which `recorder` records decoding passes; None: they are not recorded."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder for a device; None if passes are not recorded."""
    if _recorders:
        return _recorders[-1]
    enabled = device.type == "cuda" and os.environ.get("ONECARD_ROLLOUT_GRAPHS") == "1"
    return cuda_graph if enabled else None


def cuda_graph(run: Pass, inputs: Inputs) -> Pass:
    """Capture a pass as a CUDA graph. The pass runs WARMUPS times first, with its side effects.

    `inputs` become the graph's static buffers: a replay copies new values into them.
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
        for name, buffer in inputs.items():
            buffer.copy_(new[name])
        graph.replay()
        return out.clone()

    return replay


class RecordedPass:
    """Replays a recorded pass, and records it again whenever `shape` changes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder
        self.shape: tuple[int, ...] | None = None
        self.replay: Pass | None = None

    def __call__(self, run: Pass, inputs: Inputs, shape: tuple[int, ...]) -> Tensor:
        if shape != self.shape:
            self.shape, self.replay = shape, None  # free the old recording first: it holds the memory of its pass
            self.replay = self.record(run, inputs)
        return run(inputs) if self.replay is None else self.replay(inputs)

    def forget(self) -> None:
        """Drop the recording: its memory has been freed."""
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
