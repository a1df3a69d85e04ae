"""docs/kernels.md: the figure's memory is what the library, eager code and TRL allocate."""

from __future__ import annotations

import importlib.util
import json
import sys
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onecard_kernels.logprob import linear, matmul, tuning
from tests.kernels.kernels_docs import ROOT

PICTURE = ROOT / "docs" / "kernels-memory.png"


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_memory", ROOT / "docs" / "examples" / "kernels_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were, beyond those that are given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0
        for x in given:
            self.known.add(id(x.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor):
                self.see(x.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def peak_from_here(self) -> int:
        peak, self.peak = self.peak, self.now
        return peak


def inputs(shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Real sizes, no memory."""
    meta = torch.device("meta")
    hidden = torch.empty(shape.tokens, shape.hidden, dtype=torch.bfloat16, device=meta)
    weight = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=meta)
    return hidden, weight, torch.empty(shape.tokens, dtype=torch.int64, device=meta)


def totals(phases: Any) -> list[int]:
    return [sum(held.values()) for held in phases]


def assert_counts(counted: int, held: int, shape: Any, what: str) -> None:
    """To the vectors of a few numbers per token, which the figure leaves out."""
    small = 32 * 8 * shape.tokens
    said = f"{what}: the figure has {counted / 1e6:.1f} MB, the code {held / 1e6:.1f} MB"
    assert counted <= held <= counted + small, said


@pytest.mark.parametrize("implementation", tuning.IMPLEMENTATIONS)
def test_figure_counts_what_the_code_allocates(
    implementation: str, memory: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself at the figure's size, on tensors without data, with the dtypes that CUDA has."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    shape = memory.Shape()
    phases = memory.tiled(shape) if implementation == tuning.TILED else memory.ours(implementation)(shape)
    forward, between, backward = totals(phases)
    monkeypatch.setattr(matmul, "operand_dtype", lambda hidden, weight, accumulated, device: hidden)
    for kind in (JITFunction, InterpretedFunction):  # launches are neither run nor kept: keeping would hold tensors
        monkeypatch.setattr(kind, "run", lambda *args, **given: None)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it makes tensors of its own
    hidden, weight, targets = inputs(shape)
    with tuning.override(implementation=implementation):
        sizes = tuning.choose(shape.vocabulary, torch.float32, torch.device("cuda"))
    monkeypatch.setattr(linear, "choose", lambda *args, **options: sizes)
    mode = linear.FORWARD if implementation == tuning.TILED else linear.FROZEN
    with Held(hidden, weight, targets) as held:
        # The operator's body: called as an operator it would be a step without an inside.
        given = (hidden, weight, targets, None, None, None, 1.0, 1.0, None, False, False, False, mode, "triton")
        logprobs, _, _, direction, *_ = linear._forward._init_fn(*given)
        assert_counts(forward, held.peak_from_here(), shape, "forward")
        assert_counts(between, held.now, shape, "between")
        if mode == linear.FORWARD:
            return
        row = torch.empty_like(logprobs)
        grad = linear.scale_directions._init_fn(None, row.isfinite(), direction, row, row, None)
        assert_counts(backward, held.peak_from_here(), shape, "backward")
        assert grad.shape == hidden.shape


def test_figure_counts_what_eager_allocates(memory: ModuleType) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    shape = memory.Shape()
    forward, between, backward = totals(memory.eager(shape))
    hidden, weight, targets = inputs(shape)
    hidden.requires_grad_()

    def logprobs() -> Tensor:
        logits = hidden @ weight.t()
        return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)

    with Held(hidden, weight, targets) as held:
        out = logprobs()
        assert_counts(forward, held.peak_from_here(), shape, "forward")
        assert_counts(between, held.now, shape, "between")
        out.sum().backward()
        assert_counts(backward, held.peak, shape, "backward")


def test_figure_counts_what_trl_allocates(memory: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its kernels and products, which allocate nothing, left out."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="counts TRL's own code")
    utils = pytest.importorskip("trl.trainer.utils")
    torch.utils.deterministic.fill_uninitialized_memory = False
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked, name, lambda *args, **options: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # it does not know "meta"
    shape = memory.Shape()
    forward, between, backward = totals(memory.recompute(shape))
    hidden, weight, targets = inputs(shape)
    hidden.requires_grad_()
    with Held(hidden, weight, targets) as held:
        width = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        out = chunked.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, width, None, 1.0, ("log_probs",)
        )[0]
        assert_counts(forward, held.peak_from_here(), shape, "forward")
        assert_counts(between, held.now, shape, "between")
        out.sum().backward()
        assert_counts(backward, held.peak, shape, "backward")


def test_picture_is_of_today(memory: ModuleType) -> None:
    image = pytest.importorskip("PIL.Image")
    drawn = json.loads(image.open(PICTURE).text["Description"])
    now = json.loads(json.dumps(memory.count(memory.Shape())))
    assert drawn == now, "run: python docs/examples/kernels_memory.py docs/kernels-memory.png"
