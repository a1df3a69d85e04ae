"""Activation offloading: tensors that autograd saves for the backward are kept in host memory until it needs them.

    forward: autograd saves a tensor -> its storage is copied to the host and can be freed on the device
    backward: autograd unpacks the tensor -> its storage is copied back, and those saved before it are prefetched

Storages are copied, not tensors: several saved views of one storage become one copy. Weights are not offloaded. On
CUDA, copies run on a side stream in parallel with computation. With checkpointed layers autograd saves the layers'
inputs only, so only these are copied.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

# Smallest storage that is offloaded: hidden states take thousands of bytes per token, LoRA's activations few
LEAST_BYTES = 1 << 20
IN_FLIGHT = 2  # storages whose copies to the host may be unfinished; they stay allocated on the device
AHEAD = 2  # storages that are prefetched before the backward needs them

Event = Any  # torch.cuda.Event, which CPU builds of torch have no type for


class Copier(Protocol):
    """Copies flat byte tensors between a device and the host."""

    def push(self, flat: Tensor) -> Tensor:
        """Start a copy to the host. The device memory is not reused before the copy is finished."""
        ...

    def release(self, keep: int = 0) -> None:
        """Free the device memory of pushed tensors, except the last `keep`."""
        ...

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        """Start a copy to the device. Returns the bytes and the event to wait for before they are read, or None."""
        ...

    def wait(self, event: Event) -> None:
        """Make the device wait for an event; the host does not wait."""
        ...


class CudaCopier:
    """Copies to and from pinned host memory on a side stream.

    The host never waits. The compute stream waits for the copy of a storage before the storage is freed, so the memory
    is only overwritten after the copy has read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pushed: deque[tuple[Tensor, Event]] = deque()

    def push(self, flat: Tensor) -> Tensor:
        host = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
        self.copy(host, flat)
        self.pushed.append((flat, self.stream.record_event()))
        self.release(IN_FLIGHT)
        return host

    def release(self, keep: int = 0) -> None:
        while len(self.pushed) > keep:
            flat, copied = self.pushed.popleft()
            self.wait(copied)
            del flat  # after the wait, so that its memory is reused only after the copy

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        flat = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.copy(flat, host)
        return flat, self.stream.record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy on the side stream, after all work that is queued on the compute stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)


class PlainCopier:
    """Synchronous copies on the CPU, for tests. They save no memory there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def push(self, flat: Tensor) -> Tensor:
        return flat.clone()

    def release(self, keep: int = 0) -> None:
        """Does nothing: no copy is in flight."""

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        return host.clone(), None

    def wait(self, event: Event) -> None:
        """Does nothing: no copy is in flight."""


class MetaCopier(PlainCopier):
    """Copies on meta, for memory plans: host copies take no memory, and `pull` returns a new storage."""

    def push(self, flat: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device), None


COPIERS: dict[str, type[CudaCopier] | type[PlainCopier]] = {"cuda": CudaCopier, "meta": MetaCopier}


class OffloadedStorage:
    """The host copy of one storage. It is freed when no saved tensor refers to it."""

    def __init__(self, flat: Tensor, copier: Copier, previous: weakref.ref[OffloadedStorage] | None) -> None:
        self.nbytes = flat.numel()
        self.copier = copier
        self.previous = previous  # the storage saved before this one, which the backward needs after it
        self.flat: Tensor | None = None
        self.pulled: Event | None = None
        self.host = copier.push(flat)

    def prefetch(self) -> None:
        """Start the copy back to the device, if it has not been started."""
        if self.flat is None:
            self.flat, self.pulled = self.copier.pull(self.host, self.nbytes)

    def fetch(self) -> Tensor:
        """The bytes on the device. They stay there for the other operations that saved this storage."""
        self.prefetch()
        self.wait()
        assert self.flat is not None
        return self.flat

    def wait(self) -> None:
        """Wait for the copy back to the device, if one is in flight."""
        if self.pulled is not None:
            self.copier.wait(self.pulled)
            self.pulled = None

    def __del__(self) -> None:
        self.wait()  # the memory must not be reused while a copy writes to it


@dataclass(frozen=True)
class OffloadedTensor:
    """What autograd saves in place of an offloaded tensor: its storage, and its place in the storage."""

    storage: OffloadedStorage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The tensor on the device. The storages that the backward will probably need next are prefetched."""
        flat = self.storage.fetch()
        tensor = torch.empty(0, dtype=self.dtype, device=flat.device)
        tensor.set_(cast(Any, flat.untyped_storage()), self.offset, self.size, self.stride)
        previous = self.storage.previous
        for _ in range(AHEAD):
            storage = previous() if previous is not None else None
            if storage is None:
                break
            storage.prefetch()
            previous = storage.previous
        return tensor


def unpack(saved: Tensor | OffloadedTensor) -> Tensor:
    """The tensor that `pack` was called with."""
    return saved.tensor() if isinstance(saved, OffloadedTensor) else saved


@dataclass(frozen=True)
class CopiedStorage:
    """A storage that was copied in this forward, with its version at that time."""

    source: Any  # a weak reference; while it exists, no other storage has the same key
    version: int
    copy: weakref.ref[OffloadedStorage]


class Offloader:
    """`with offloader.hooks(): forward` offloads the tensors that autograd saves inside.

    Not offloaded: weights and buffers of `model`, integers and masks, and storages smaller than `least_bytes`.
    """

    def __init__(self, model: nn.Module, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        self.model = model
        self.least_bytes = least_bytes
        self.copier: Copier = COPIERS.get(device.type, PlainCopier)(device)

    def is_excluded(self, tensor: Tensor, weights: set[int]) -> bool:
        """Whether a tensor is not offloaded. `weights`: keys of the storages of parameters and buffers."""
        if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.is_floating_point():
            return True  # parameters, quantized weights, sparse tensors, ids and masks
        storage = tensor.untyped_storage()
        return storage.nbytes() < self.least_bytes or storage._cdata in weights

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Context of one forward pass. Its backward may run at any later time."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        weights = {tensor.untyped_storage()._cdata for tensor in tensors}
        copied: dict[int, CopiedStorage] = {}
        last: list[weakref.ref[OffloadedStorage]] = []

        def pack(tensor: Tensor) -> Tensor | OffloadedTensor:
            if self.is_excluded(tensor, weights):
                return tensor
            source = tensor.untyped_storage()
            known = copied.get(source._cdata)
            storage = known.copy() if known is not None and known.version == tensor._version else None
            if storage is None:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(cast(Any, source))
                storage = OffloadedStorage(flat, self.copier, last[-1] if last else None)
                copied[source._cdata] = CopiedStorage(StorageWeakRef(source), tensor._version, weakref.ref(storage))
                last[:] = [weakref.ref(storage)]
            offset = int(tensor.storage_offset())
            return OffloadedTensor(storage, tensor.dtype, tensor.size(), tensor.stride(), offset)

        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            copied.clear()
            self.copier.release()
