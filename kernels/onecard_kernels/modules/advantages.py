"""Faces of the advantages."""

from __future__ import annotations

from torch import Tensor

from ..advantages import gae, group_advantages, masked_whiten
from ..records import Advantages
from .face import Face


class GAE(Face):
    """`gae` as a module."""

    def __init__(self, *, gamma: float = 1.0, lam: float = 0.95, backend: str = "auto") -> None:
        super().__init__(gamma=gamma, lam=lam, backend=backend)

    def forward(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, last_values: Tensor | None = None
    ) -> Advantages:
        return gae(rewards, values, mask, last_values=last_values, **self.options)


class GroupAdvantages(Face):
    """`group_advantages` as a module."""

    def __init__(self, *, group_size: int, kind: str = "grpo", eps: float = 1e-4) -> None:
        super().__init__(group_size=group_size, kind=kind, eps=eps)

    def forward(self, scores: Tensor) -> Tensor:
        return group_advantages(scores, **self.options)


class MaskedWhiten(Face):
    """`masked_whiten` as a module."""

    def __init__(self, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8) -> None:
        super().__init__(shift_mean=shift_mean, unbiased=unbiased, eps=eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return masked_whiten(x, mask, **self.options)
