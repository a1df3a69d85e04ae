"""Tracks the memory of tensors while code runs on `meta`, where nothing is computed.

Every storage that an operator creates is counted until it is freed, rounded up as the target's allocator rounds. Memory
that an operator allocates and frees before it returns is not visible here; a table of workspaces has its size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRANULARITY = {"cuda": 512, "cpu": 1}  # bytes that an allocation is rounded up to; CPU profiles count exact sizes
ACTIVATIONS = "activations and temporaries"
PAGED = "paged optimizer states"  # in unified memory: the driver moves them to the host when the card is full
OUTSIDE_ALLOCATOR = {PAGED}  # kinds of memory that PyTorch's CUDA allocator does not count

# `bool(tensor)` on meta returns False. So checks for NaN logits find none, and no attention mask is all ones: prompts
# count as padded, and a mask is created.
LOCAL_SCALAR = "aten::_local_scalar_dense"

Workspace = Callable[..., int]  # an operator's arguments -> bytes that it allocates besides its outputs while it runs


@dataclass
class Phase:
    """The peak of a phase, in bytes.

    `before`: bytes allocated at its start; `parts`: the peak by kind of memory; `peak_operator`: operator at the peak.
    """

    name: str
    before: int = 0
    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    peak_operator: str = ""


class ShapeCache:
    """Runs operators on meta, with a cache of output shapes by argument shapes.

    A model's layers repeat the same calls, and shape inference would take most of a plan's time.
    """

    def __init__(self) -> None:
        self.results: dict[Any, tuple[bool, list[tuple[Any, ...]]]] = {}
        self.returns_new_by_operator: dict[Any, bool] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # The meta implementation accepts only bfloat16; those of CPU and GPU accept other dtypes too.
            out = self.run(func, tuple(arg.bfloat16() if is_floating(arg) else arg for arg in args), kwargs)
            return torch.empty_strided(out.shape, out.stride(), dtype=args[0].dtype, device="meta")
        if not self.returns_new(func):
            return func(*args, **kwargs)
        key = (func, shape_key(args), shape_key(tuple(kwargs.items())))
        cached = self.results.get(key)
        if cached is not None:
            single, shapes = cached
            outs = [torch.empty_strided(*size, dtype=dtype, device="meta") for *size, dtype in shapes]
            return outs[0] if single else tuple(outs)
        out = func(*args, **kwargs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        storages = {id(tensor.untyped_storage()) for tensor in inputs}
        cacheable = all(
            isinstance(tensor, Tensor) and tensor.is_meta and id(tensor.untyped_storage()) not in storages
            for tensor in outs
        )
        if cacheable and any(tensor.is_meta for tensor in inputs):
            shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in outs]
            self.results[key] = isinstance(out, Tensor), shapes
        return out

    def returns_new(self, func: Any) -> bool:
        """Whether an operator returns new tensors only and changes no argument, by its schema."""
        if func not in self.returns_new_by_operator:
            schema = func._schema
            unchanged = not any(argument.alias_info for argument in (*schema.arguments, *schema.returns))
            tensors = all(isinstance(returned.type, torch.TensorType) for returned in schema.returns)
            self.returns_new_by_operator[func] = unchanged and tensors and bool(schema.returns)
        return self.returns_new_by_operator[func]


def is_floating(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def shape_key(argument: Any) -> Any:
    """The properties of an argument that the shapes of an operator's outputs depend on."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device.type
    if isinstance(argument, tuple | list):
        return tuple(shape_key(element) for element in argument)
    return type(argument), argument


@dataclass
class TrackedStorage:
    """A storage's size in bytes, rounded as the allocator rounds, and its kind of memory."""

    size: int
    kind: str


class Tracker(TorchDispatchMode):
    """`with tracker, tracker.phase("train") as phase: ...` records the peak memory of storages on `meta`."""

    def __init__(self, target: torch.device, workspaces: Mapping[str, Workspace]) -> None:
        super().__init__()
        self.target, self.workspaces = target, workspaces
        self.granularity = GRANULARITY[target.type]
        self.current = 0
        self.by_kind: dict[str, int] = {}
        self.storages: dict[int, TrackedStorage] = {}
        self.new_kind = ACTIVATIONS  # kind of the storages that operators create
        self.phases: list[Phase] = []
        self.shapes = ShapeCache()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name == LOCAL_SCALAR and args[0].is_meta and args[0].dtype == torch.bool:
            return False
        out = self.shapes.run(func, args, kwargs or {})
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self.track(leaf, self.new_kind)
        workspace = self.workspaces.get(name)
        extra = 0 if workspace is None else workspace(self.target, *args, **(kwargs or {}))
        self.update_peaks(extra, name)
        return out

    def rounded(self, size: int) -> int:
        """Bytes that the allocator takes for `size` bytes."""
        return -(-size // self.granularity) * self.granularity

    def track(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage until it is freed, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.storages:
            return
        self.storages[key] = TrackedStorage(self.rounded(storage.nbytes()), kind)
        self.add(kind, self.storages[key].size)
        weakref.finalize(storage, self.untrack, key).atexit = False

    def untrack(self, key: int) -> None:
        """Subtract a storage that was freed."""
        freed = self.storages.pop(key)
        self.add(freed.kind, -freed.size)

    def add(self, kind: str, size: int) -> None:
        """Add `size` bytes, negative for freed ones, to the totals."""
        self.current += size * (kind not in OUTSIDE_ALLOCATOR)
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size

    def tag(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Set the kind of tensors' storages; storages that are not counted yet are counted from here on."""
        for tensor in tensors:
            if tensor is None or not tensor.is_meta:
                continue
            self.track(tensor, kind)
            storage = self.storages[id(tensor.untyped_storage())]
            if storage.kind != kind:
                self.add(storage.kind, -storage.size)
                storage.kind = kind
                self.add(kind, storage.size)

    def kind(self, tensor: Tensor) -> str | None:
        """The kind of a tensor's storage; None if it is not counted."""
        storage = self.storages.get(id(tensor.untyped_storage()))
        return None if storage is None else storage.kind

    def update_peaks(self, extra: int, name: str) -> None:
        """Update the peaks of all open phases with the current bytes plus `extra`. `name`: the operator that ran."""
        total = self.current + extra
        for phase in self.phases:
            if total > phase.peak:
                phase.peak, phase.peak_operator = total, name
                counted = {kind: size for kind, size in self.by_kind.items() if kind not in OUTSIDE_ALLOCATOR}
                phase.parts = {kind: size for kind, size in counted.items() if size}
                if extra:
                    phase.parts[ACTIVATIONS] = phase.parts.get(ACTIVATIONS, 0) + extra

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Record the peak of the code inside as the phase `name`."""
        phase = Phase(name, self.current)
        self.phases.append(phase)
        self.update_peaks(0, "")
        try:
            yield phase
        finally:
            self.phases.remove(phase)

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """Context in which new storages count as this kind of memory."""
        before, self.new_kind = self.new_kind, kind
        try:
            yield
        finally:
            self.new_kind = before
