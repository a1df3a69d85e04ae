"""What the backward needs, held in host memory between the forward and the backward.

    forward: autograd saves a tensor -> its storage is copied to the host, and may be freed on the device
    backward: autograd asks for it -> its storage comes back, and the one that was saved before it sets out

Storages are copied, not tensors: the views that several operations save of one storage become one copy. Weights stay
where they are. On CUDA both ways run on a stream of their own, beside the computing. With checkpointed layers autograd
saves nothing but the layers' inputs, so those alone travel.
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

LEAST_BYTES = 1 << 20  # of a storage that is worth a copy; a token's row has thousands of bytes, LoRA's inner ones few
IN_FLIGHT = 2  # storages that are kept on the device because their copies to the host may not be over
AHEAD = 2  # storages that set out before the backward asks for them

Event = Any  # torch.cuda.Event, which CPU builds of torch have no type for


class Copier(Protocol):
    """Moves flat bytes between a device and the host."""

    def push(self, flat: Tensor) -> Tensor:
        """Begin a copy to the host. The device's memory is not reused before it is over."""
        ...

    def settle(self, most: int = 0) -> None:
        """Let go of what has been pushed, but for the last `most`."""
        ...

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        """Begin a copy to the device: the bytes, and what is to be waited for before they are read."""
        ...

    def wait(self, event: Event) -> None:
        """Have the device wait, the host not."""
        ...


class CudaCopier:
    """Pinned host memory, and a stream beside the one that computes.

    No host thread waits: the computing stream waits for the copy of a storage before it lets go of it, so whatever is
    put into that memory next is written after the copy has read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pushed: deque[tuple[Tensor, Event]] = deque()

    def push(self, flat: Tensor) -> Tensor:
        host = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
        self.copy(host, flat)
        self.pushed.append((flat, self.stream.record_event()))
        self.settle(IN_FLIGHT)
        return host

    def settle(self, most: int = 0) -> None:
        while len(self.pushed) > most:
            flat, copied = self.pushed.popleft()
            self.wait(copied)
            del flat  # after the wait, so that its memory is reused behind it

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        flat = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.copy(flat, host)
        return flat, self.stream.record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """On the side stream, behind all that the computing stream was told so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)


class PlainCopier:
    """Copies at once. For tests: where host and device are one there is nothing to gain."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def push(self, flat: Tensor) -> Tensor:
        return flat.clone()

    def settle(self, most: int = 0) -> None:
        """Nothing is in flight."""

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        return host.clone(), None

    def wait(self, event: Event) -> None:
        """Nothing is in flight."""


class PlannedCopier(PlainCopier):
    """On meta: bytes that are on no device, and come back as new ones."""

    def push(self, flat: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def pull(self, host: Tensor, nbytes: int) -> tuple[Tensor, Event | None]:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device), None


COPIERS: dict[str, type[CudaCopier] | type[PlainCopier]] = {"cuda": CudaCopier, "meta": PlannedCopier}


class DecodeBatch:
    """One storage on the host. It lives as long as an operation's backward has use for it."""

    def __init__(self, flat: Tensor, copier: Copier, before: weakref.ref[DecodeBatch] | None) -> None:
        self.nbytes = flat.numel()
        self.copier = copier
        self.before = before  # the one that was saved before it, and is needed after it
        self.flat: Tensor | None = None
        self.coming: Event | None = None
        self.host = copier.push(flat)

    def set_out(self) -> None:
        """Begin the way back, if that has not been done."""
        if self.flat is None:
            self.flat, self.coming = self.copier.pull(self.host, self.nbytes)

    def arrive(self) -> Tensor:
        """The bytes on the device. They stay there for the other operations that saved this storage."""
        self.set_out()
        self.settle()
        assert self.flat is not None
        return self.flat

    def settle(self) -> None:
        """Wait for the way back, if one is under way."""
        if self.coming is not None:
            self.copier.wait(self.coming)
            self.coming = None

    def __del__(self) -> None:
        self.settle()  # memory that a copy is still written to must not be anybody else's


@dataclass(frozen=True)
class Ticket:
    """What autograd keeps in a tensor's place."""

    held: DecodeBatch
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The tensor again; the storages that are likely to be asked for next set out."""
        flat = self.held.arrive()
        found = torch.empty(0, dtype=self.dtype, device=flat.device)
        found.set_(cast(Any, flat.untyped_storage()), self.offset, self.size, self.stride)
        follower = self.held.before
        for _ in range(AHEAD):
            each = follower() if follower is not None else None
            if each is None:
                break
            each.set_out()
            follower = each.before
        return found


def unpack(saved: Tensor | Ticket) -> Tensor:
    """What `pack` was given."""
    return saved.tensor() if isinstance(saved, Ticket) else saved


@dataclass(frozen=True)
class Seen:
    """A storage that has been copied in this forward, as it was then."""

    storage: Any  # a weak reference; as long as it is there, no other storage has the same key
    version: int
    held: weakref.ref[DecodeBatch]


class Offloader:
    """`with offloader.hooks(): forward`: what autograd saves inside goes to the host.

    Left on the device: weights and buffers of `model`, integers and masks, and storages below `least_bytes`.
    """

    def __init__(self, model: nn.Module, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        self.model = model
        self.least_bytes = least_bytes
        self.copier: Copier = COPIERS.get(device.type, PlainCopier)(device)

    def stays(self, tensor: Tensor, weights: set[int]) -> bool:
        """Whether a tensor is left on the device."""
        if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.is_floating_point():
            return True  # parameters, quantized weights, sparse tensors, ids and masks
        storage = tensor.untyped_storage()
        return storage.nbytes() < self.least_bytes or storage._cdata in weights

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Around one forward pass; its backward may come any time later."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        weights = {tensor.untyped_storage()._cdata for tensor in tensors}
        seen: dict[int, Seen] = {}
        last: list[weakref.ref[DecodeBatch]] = []

        def pack(tensor: Tensor) -> Tensor | Ticket:
            if self.stays(tensor, weights):
                return tensor
            storage = tensor.untyped_storage()
            known = seen.get(storage._cdata)
            held = known.held() if known is not None and known.version == tensor._version else None
            if held is None:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(cast(Any, storage))
                held = DecodeBatch(flat, self.copier, last[-1] if last else None)
                seen[storage._cdata] = Seen(StorageWeakRef(storage), tensor._version, weakref.ref(held))
                last[:] = [weakref.ref(held)]
            return Ticket(held, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            seen.clear()
            self.copier.settle()
