"""Choice of the implementation: `backend="auto" | "triton" | "torch"`.

The entries of `TABLE` are import paths. A backend is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from . import launch

BACKENDS = ("auto", "triton", "torch")

TABLE: dict[str, dict[str, str]] = {
    "gae": {"torch": "onecard_kernels.advantages.torch_gae:gae", "triton": "onecard_kernels.advantages.triton:gae"},
    "linear_logprobs": {  # the pass over a tile of logits
        "torch": "onecard_kernels.logprob.online_softmax:exp_tile",
        "triton": "onecard_kernels.logprob.triton_exp:exp_tile",
    },
    "linear_kl": {  # the pass over two chunks of logits
        "torch": "onecard_kernels.kl.torch_kl:kl_pass_",
        "triton": "onecard_kernels.kl.triton:kl_pass_",
    },
    "logits_ppo_loss": {
        "torch": "onecard_kernels.ppo.torch_losses:logits_ppo_loss",
        "triton": "onecard_kernels.ppo.triton_ops:logits_ppo_loss",
    },
    "policy_terms": {  # of linear_ppo_loss
        "torch": "onecard_kernels.ppo.torch_losses:policy_terms",
        "triton": "onecard_kernels.ppo.triton:policy_terms",
    },
    "ppo_loss": {
        "torch": "onecard_kernels.ppo.torch_losses:ppo_loss",
        "triton": "onecard_kernels.ppo.triton_ops:ppo_loss",
    },
    "selective_log_softmax": {
        "torch": "onecard_kernels.logprob.torch_rows:forward",
        "triton": "onecard_kernels.logprob.triton_rows:forward",
    },
    "value_loss": {
        "torch": "onecard_kernels.ppo.torch_losses:value_loss",
        "triton": "onecard_kernels.ppo.triton_ops:value_loss",
    },
}

# Device type -> the backends that "auto" tries, in this order. It takes the first that the function has.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("triton", "torch")}
DEFAULT_PREFERENCE = ("torch",)


def implementation(function: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of `function` for this backend and device."""
    return _load(TABLE[function][resolve(function, backend, device)])


def resolve(function: str, backend: str, device: torch.device) -> str:
    """The name of the backend that runs. Raises ValueError, with the reason, if a named backend cannot run."""
    available = TABLE[function]
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        return next(b for b in PREFERENCE.get(device.type, DEFAULT_PREFERENCE) if b in available and _runs(b, device))
    if backend not in available:
        raise ValueError(f"backend is {backend!r}, but {function} has only: {', '.join(sorted(available))}")
    if not _runs(backend, device):
        raise ValueError(f"backend is {backend!r}, but {launch.unavailable_reason(device)}")
    return backend


def _runs(backend: str, device: torch.device) -> bool:
    return backend != "triton" or launch.unavailable_reason(device) is None


_LOADED: dict[str, Callable[..., Any]] = {}


def _load(address: str) -> Callable[..., Any]:
    _import(address)
    return _LOADED[address]


@launch.constant_in_graphs  # torch.compile cannot trace an import: it calls this function while it traces
def _import(address: str) -> None:
    """Import all entries of the address's backend: torch.compile reads `_LOADED` once, and misses later entries."""
    if address in _LOADED:
        return
    backend = next(name for row in TABLE.values() for name, at in row.items() if at == address)
    for other in (row[backend] for row in TABLE.values() if backend in row):
        module, function = other.split(":")
        _LOADED[other] = getattr(import_module(module), function)
