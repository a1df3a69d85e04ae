"""What bounds a case: the rate of bare products on this machine, and a card's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.train_step.cases import Case

GEMM_FLOPS = {"cpu": 2e10, "cuda": 2e13}  # enough to be timed, and little beside a step; of small steps as many


class BareProducts:
    """Products of the feed-forward matrix's shape, and their FLOPs: the rate that this machine gives.

    The operands are made when it is called, and let go of after it: under a cap they would take a step's memory.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, rows: int, step: float) -> None:
        one = 2 * rows * case.model.hidden * case.model.inner
        self.sizes, self.device, self.dtype = (rows, case.model.hidden, case.model.inner), device, dtype
        self.times = max(1, int(min(GEMM_FLOPS[device.type], step) / one))
        self.flops = one * self.times
        self.operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def ready(self) -> None:
        """Make the operands, and warm up: a product after other work is not the first of its kind."""
        rows, hidden, inner = self.sizes
        left = torch.randn(rows, hidden, device=self.device, dtype=self.dtype)
        right = torch.randn(hidden, inner, device=self.device, dtype=self.dtype)
        self.operands = left, right, left @ right

    def __call__(self) -> None:
        assert self.operands is not None
        left, right, out = self.operands
        for _ in range(self.times):
            torch.mm(left, right, out=out)
        self.operands = None


@contextmanager
def capped(gib: float, device: torch.device) -> Iterator[None]:
    """Inside, an allocation past `gib` fails. A big card with a cap is not a consumer card: it is as fast as before."""
    if not gib or device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(
        gib * 2**30 / torch.cuda.get_device_properties(device).total_memory, device
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
