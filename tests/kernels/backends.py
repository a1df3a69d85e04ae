"""The backends as parameters of a test: Triton is skipped, with a reason, where it does not run."""

from __future__ import annotations

import pytest
import torch

from onecard_kernels import launch

TRITON = launch.unavailable_reason(torch.device("cpu")) is None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton does not run here")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
