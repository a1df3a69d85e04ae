"""Every test of the kernels runs with fresh memory full of NaN, so that reading what was never written shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """In deterministic mode torch fills `empty`, `new_empty` and `empty_like` with NaN (largest integer for ints)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
