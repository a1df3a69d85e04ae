"""A few tokens, their mask and targets, and a head with all its parts: small, for every rule is tried on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

N, D, V = 5, 3, 11


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def head() -> tuple[Tensor, Tensor, float, float, float]:
    """bias, forbidden, temperature, logit_scale, softcap"""
    return torch.randn(V), torch.arange(V) == 2, 0.7, 1.2, 5.0


HEAD_KINDS = ("plain", "bias", "temperature", "scale", "softcap", "forbidden", "all")


def head_options(kind: str, v: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keywords of one part of a head, or of all of them."""
    forbidden = torch.zeros(v, dtype=torch.bool)
    forbidden[v // 3 : v // 3 + v // 4] = True
    table: dict[str, dict[str, Any]] = {
        "plain": {},
        "bias": {"bias": torch.randn(v).to(dtype)},
        "temperature": {"temperature": 0.7},
        "scale": {"logit_scale": 0.25},
        "softcap": {"softcap": 5.0},
        "forbidden": {"forbidden": forbidden},
    }
    table["all"] = {name: value for options in table.values() for name, value in options.items()}
    return table[kind]


MASK = torch.tensor([1, 0, 1, 1, 1])
TARGETS = torch.tensor([0, 1, 3, V - 1, V - 1])
