"""Faces of PPO's losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ppo import linear_ppo_loss, logits_ppo_loss, ppo_loss, value_loss
from ..records import Loss
from .face import Face


class _PolicyLoss(Face):
    """The options that all policy losses have."""

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        entropy_coef: float = 0.0,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            backend=backend,
        )


class PPOLoss(_PolicyLoss):
    """`ppo_loss` as a module."""

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        *,
        entropy: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return ppo_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class LogitsPPOLoss(_PolicyLoss):
    """`logits_ppo_loss` as a module."""

    def __init__(self, *, temperature: float = 1.0, **ppo: Any) -> None:
        super().__init__(**ppo)
        self.options.update(temperature=temperature)

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return logits_ppo_loss(
            logits,
            targets,
            old_logprobs,
            advantages,
            mask,
            ref_logprobs=ref_logprobs,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class LinearPPOLoss(_PolicyLoss):
    """`linear_ppo_loss` as a module."""

    def __init__(
        self, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, **ppo: Any
    ) -> None:
        super().__init__(**ppo)
        self.options.update(temperature=temperature, logit_scale=logit_scale, softcap=softcap)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        forbidden: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return linear_ppo_loss(
            hidden,
            weight,
            targets,
            old_logprobs,
            advantages,
            mask,
            bias=bias,
            forbidden=forbidden,
            ref_logprobs=ref_logprobs,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class ValueLoss(Face):
    """`value_loss` as a module."""

    def __init__(self, *, clip: float | None = 0.2, backend: str = "auto") -> None:
        super().__init__(clip=clip, backend=backend)

    def forward(
        self,
        values: Tensor,
        old_values: Tensor | None,
        returns: Tensor,
        mask: Tensor,
        *,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return value_loss(values, old_values, returns, mask, weights=weights, normalizer=normalizer, **self.options)
