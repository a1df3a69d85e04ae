"""Follows the memory of tensors from birth to death while code runs on `meta`, where nothing is computed.

Every storage that an operator makes is counted until its last owner lets go of it, in the steps of the target's
allocator. What an operator allocates inside, and frees before it returns, is not seen: a table says how much it is.
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

GRANULARITY = {"cuda": 512, "cpu": 1}  # bytes that an allocation is rounded up to; the profiler counts what was asked
WORK = "activations and temporaries"
PAGED = "paged optimizer states"  # in memory that card and host share: they leave the card when it is full
APART = {PAGED}  # kinds that the allocator of the card knows nothing of

# Whether something holds of values that are not there: it does not. No logit is NaN; not all of a mask is ones, so that
# prompts are of different lengths, and a mask is made.
ASKED = "aten::_local_scalar_dense"

Workspace = Callable[..., int]  # an operator's arguments -> bytes that it holds beyond its outputs while it runs


@dataclass
class Phase:
    """The most that was held at once while something ran, and of what; `most` names the operator that took it there.

    `before` is what was held when it began.
    """

    name: str
    before: int = 0
    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    most: str = ""


class KnownShapes:
    """What operators give for arguments of given shapes, looked up from the second time on.

    A model's layers ask the same over and over, and most of a plan's time would go into working it out again.
    """

    def __init__(self) -> None:
        self.results: dict[Any, tuple[bool, list[tuple[Any, ...]]]] = {}
        self.fresh: dict[Any, bool] = {}  # operator -> whether its results are new tensors and its arguments unchanged

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # On meta it takes nothing else, though the devices do.
            out = self.run(func, tuple(each.bfloat16() if is_floating(each) else each for each in args), kwargs)
            return torch.empty_strided(out.shape, out.stride(), dtype=args[0].dtype, device="meta")
        if not self.makes_new(func):
            return func(*args, **kwargs)
        key = (func, described(args), described(tuple(kwargs.items())))
        known = self.results.get(key)
        if known is not None:
            single, made = known
            outs = [torch.empty_strided(*size, dtype=dtype, device="meta") for *size, dtype in made]
            return outs[0] if single else tuple(outs)
        out = func(*args, **kwargs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        storages = {id(each.untyped_storage()) for each in given}
        plain = all(
            isinstance(each, Tensor) and each.is_meta and id(each.untyped_storage()) not in storages for each in outs
        )
        if plain and any(each.is_meta for each in given):
            self.results[key] = isinstance(out, Tensor), [(each.shape, each.stride(), each.dtype) for each in outs]
        return out

    def makes_new(self, func: Any) -> bool:
        if func not in self.fresh:
            schema = func._schema
            unchanged = not any(each.alias_info for each in (*schema.arguments, *schema.returns))
            tensors = all(isinstance(each.type, torch.TensorType) for each in schema.returns)
            self.fresh[func] = unchanged and tensors and bool(schema.returns)
        return self.fresh[func]


def is_floating(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()


def described(given: Any) -> Any:
    """What a result's shape depends on of an argument."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype, given.device.type
    if isinstance(given, tuple | list):
        return tuple(described(each) for each in given)
    return type(given), given


@dataclass
class LiveStorage:
    size: int
    kind: str


class Tracker(TorchDispatchMode):
    """`with tracker, tracker.phase("train") as phase: ...` counts storages on `meta`, in the target's steps."""

    def __init__(self, target: torch.device, workspaces: Mapping[str, Workspace]) -> None:
        super().__init__()
        self.target, self.workspaces = target, workspaces
        self.step = GRANULARITY[target.type]
        self.current = 0
        self.by_kind: dict[str, int] = {}
        self.held: dict[int, LiveStorage] = {}
        self.new_kind = WORK
        self.phases: list[Phase] = []
        self.shapes = KnownShapes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name == ASKED and args[0].is_meta and args[0].dtype == torch.bool:
            return False
        out = self.shapes.run(func, args, kwargs or {})
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self.note(leaf, self.new_kind)
        workspace = self.workspaces.get(name)
        extra = 0 if workspace is None else workspace(self.target, *args, **(kwargs or {}))
        self.reach(extra, name)
        return out

    def rounded(self, size: int) -> int:
        """What the allocator takes for so many bytes."""
        return -(-size // self.step) * self.step

    def note(self, tensor: Tensor, kind: str) -> None:
        """Begin to follow a tensor's storage, if it is a new one."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.held:
            return
        self.held[key] = LiveStorage(self.rounded(storage.nbytes()), kind)
        self.add(kind, self.held[key].size)
        weakref.finalize(storage, self.forget, key).atexit = False

    def forget(self, key: int) -> None:
        """A storage has died."""
        gone = self.held.pop(key)
        self.add(gone.kind, -gone.size)

    def add(self, kind: str, size: int) -> None:
        self.current += size * (kind not in APART)
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size

    def name(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what tensors are; those of whose storages nothing is known yet are followed from here on."""
        for tensor in tensors:
            if tensor is None or not tensor.is_meta:
                continue
            self.note(tensor, kind)
            held = self.held[id(tensor.untyped_storage())]
            if held.kind != kind:
                self.add(held.kind, -held.size)
                held.kind = kind
                self.add(kind, held.size)

    def kind(self, tensor: Tensor) -> str | None:
        """What a tensor was said to be, or None if it is not followed."""
        held = self.held.get(id(tensor.untyped_storage()))
        return None if held is None else held.kind

    def reach(self, extra: int, name: str) -> None:
        """Take note of the present height, with `extra` bytes on top, in all phases that run."""
        height = self.current + extra
        for phase in self.phases:
            if height > phase.peak:
                phase.peak, phase.most = height, name
                phase.parts = {kind: size for kind, size in self.by_kind.items() if size and kind not in APART}
                if extra:
                    phase.parts[WORK] = phase.parts.get(WORK, 0) + extra

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """The peak of what runs inside."""
        found = Phase(name, self.current)
        self.phases.append(found)
        self.reach(0, "")
        try:
            yield found
        finally:
            self.phases.remove(found)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self.new_kind = self.new_kind, kind
        try:
            yield
        finally:
            self.new_kind = before
