"""CUDA graphs for decoding: a forward pass of fixed shapes is captured once and replayed.

A decoding step launches about a thousand small kernels. Their launches from Python take longer than a large GPU needs
to run them.
In `cache_slots.py` every step has the same shapes and addresses until the cache grows or rows are removed; then the
pass is captured again.

Off unless ONECARD_ROLLOUT_GRAPHS=1: it has not been measured on a GPU yet. If the capture fails, passes run eagerly.
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
# captures a pass; returns its replay, which takes new inputs of the same shapes
CaptureFunction = Callable[[Pass, Inputs], Pass]
WARMUPS = 2  # passes before the capture: libraries allocate their workspaces in the first

_capture_functions: list[CaptureFunction | None] = []


@contextmanager
def use_capture_function(capture: CaptureFunction | None) -> Iterator[None]:
    """Context in which `capture` captures decoding passes; None: they are not captured."""
    _capture_functions.append(capture)
    try:
        yield
    finally:
        _capture_functions.pop()


def capture_function_for(device: torch.device) -> CaptureFunction | None:
    """The function that captures passes on this device; None if they are not captured."""
    if _capture_functions:
        return _capture_functions[-1]
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


class CapturedPass:
    """Captures a pass and replays it. Captures it again whenever `shape` changes."""

    def __init__(self, capture: CaptureFunction) -> None:
        self.capture: CaptureFunction | None = capture
        self.shape: tuple[int, ...] | None = None
        self.replay: Pass | None = None

    def __call__(self, run: Pass, inputs: Inputs, shape: tuple[int, ...]) -> Tensor:
        if shape != self.shape:
            self.shape, self.replay = shape, None  # free the old graph first: it holds the memory of its pass
            self.replay = self.try_capture(run, inputs)
        return run(inputs) if self.replay is None else self.replay(inputs)

    def discard(self) -> None:
        """Discard the captured pass: the cache that it reads and writes has been freed."""
        self.shape = self.replay = None

    def try_capture(self, run: Pass, inputs: Inputs) -> Pass | None:
        if self.capture is None:
            return None
        try:
            return self.capture(run, inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.capture = None
            problem = str(error).splitlines()[0][:160]
            say(f"rollout: the decoding pass cannot be captured as a CUDA graph, so it runs eagerly: {problem}")
            return None
