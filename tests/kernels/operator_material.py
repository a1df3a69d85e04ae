"""A few tokens, their mask and targets, and a head with all its parts: small, for every rule is tried on them."""

from __future__ import annotations

import torch
from torch import Tensor

N, D, V = 5, 3, 11


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def head() -> tuple[Tensor, Tensor, float, float, float]:
    """bias, forbidden, temperature, logit_scale, softcap"""
    return torch.randn(V), torch.arange(V) == 2, 0.7, 1.2, 5.0


MASK = torch.tensor([1, 0, 1, 1, 1])
TARGETS = torch.tensor([0, 1, 3, V - 1, V - 1])
