"""Result types of the public functions, the head's transform of logits, and the dtype and divisor of results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class LogProbs(NamedTuple):
    """Per-token results, all of the targets' shape; the last two are None unless they were requested."""

    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None


class Loss(NamedTuple):
    """A 0-d loss with a gradient, and 0-d detached metrics on the same device."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Advantages(NamedTuple):
    """`[B, T]` each, detached: the policy gradient's advantages, and the targets of the value function."""

    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Head:
    """The transform between the product `h @ W.T` and the softmax.

    z = (h @ W.T + bias) * logit_scale;  z = softcap * tanh(z / softcap);  z = z / temperature;  z[forbidden] = -inf
    """

    bias: Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    forbidden: Tensor | None = None

    @property
    def factor(self) -> float:
        """The constant part of dz/d(h @ W.T)."""
        return self.logit_scale / self.temperature

    def columns(self, part: slice) -> Head:
        """The head for a slice of the vocabulary."""
        bias, forbidden = (None if x is None else x[part].contiguous() for x in (self.bias, self.forbidden))
        return replace(self, bias=bias, forbidden=forbidden)

    def slope_at(self, z: Tensor) -> Tensor:
        """1 - tanh^2 at transformed logits `z`. It is 1 without a softcap, and at -inf, which gets no gradient."""
        if self.softcap is None:
            return torch.ones_like(z)
        return torch.where(z.isinf(), 1.0, 1.0 - (z * (self.temperature / self.softcap)).square())

    def transform(self, z: Tensor) -> Tensor:
        """The transform out of place, so that autograd can differentiate it."""
        if self.bias is not None:
            z = z + self.bias.to(z.dtype)
        z = z * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        z = z / self.temperature
        return z if self.forbidden is None else z.masked_fill(self.forbidden, float("-inf"))

    def transform_(self, z: Tensor, slope: Tensor | None = None) -> None:
        """The transform in place. `slope` gets 1 - tanh^2, the part of the derivative that differs between logits."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is not None:
            z.mul_(self.logit_scale / self.softcap).tanh_()
            if slope is not None:
                torch.mul(z, z, out=slope).neg_().add_(1.0)
            z.mul_(self.softcap / self.temperature)
        elif self.factor != 1.0:
            z.mul_(self.factor)
        if self.forbidden is not None:
            z.masked_fill_(self.forbidden, float("-inf"))


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if one of them is fp64, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def divisor_of(normalizer: float | Tensor | None, default: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The divisor of a loss and its metrics: the normalizer, or `default` without one."""
    chosen = default if normalizer is None else normalizer
    # Between two 0-d tensors torch promotes: an fp64 count would turn an fp32 loss into fp64.
    return chosen.detach().to(dtype) if isinstance(chosen, Tensor) else chosen
