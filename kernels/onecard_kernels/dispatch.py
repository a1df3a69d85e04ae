"""Which implementation runs: `backend="auto" | "triton" | "torch"`.

Entries are strings, imported when first asked for: a backend that is not used is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from . import launch

BACKENDS = ("auto", "triton", "torch")

TABLE: dict[str, dict[str, str]] = {
    "gae": {"torch": "onecard_kernels.advantages.reference:gae"},
    "linear_logprobs": {"torch": "onecard_kernels.logprob.chunked:linear_logprobs"},
    "ppo_loss": {"torch": "onecard_kernels.ppo.reference:ppo_loss"},
    "selective_log_softmax": {"torch": "onecard_kernels.logprob.selective:selective_log_softmax"},
    "value_loss": {"torch": "onecard_kernels.ppo.reference:value_loss"},
}

# What "auto" tries, in this order, by device type; the first one that the function has is taken.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("triton", "torch")}
ANYWHERE = ("torch",)


def implementation(function: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The callable behind `function` for this backend and device."""
    available = TABLE[function]
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        backend = next(b for b in PREFERENCE.get(device.type, ANYWHERE) if b in available and _runs(b, device))
    if backend not in available:
        raise ValueError(f"backend is {backend!r}, but {function} has only: {', '.join(sorted(available))}")
    if not _runs(backend, device):
        raise ValueError(f"backend is {backend!r}, but {launch.why_not(device)}")
    return _load(available[backend])


def _runs(backend: str, device: torch.device) -> bool:
    return backend != "triton" or launch.why_not(device) is None


@cache
def _load(address: str) -> Callable[..., Any]:
    module, name = address.split(":")
    loaded: Callable[..., Any] = getattr(import_module(module), name)
    return loaded
