"""Faces of the preference losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..dpo import cpo_loss, dpo_loss, kto_loss, linear_dpo_loss, orpo_loss, simpo_loss
from ..records import Loss
from .face import Face


class _PreferenceLoss(Face):
    """The options that all preference losses have."""

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(
            beta=beta,
            loss_type=loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            discopop_tau=discopop_tau,
        )


class DPOLoss(_PreferenceLoss):
    """`dpo_loss` as a module."""

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return dpo_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class LinearDPOLoss(_PreferenceLoss):
    """`linear_dpo_loss` as a module."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
        **dpo: Any,
    ) -> None:
        super().__init__(**dpo)
        self.options.update(temperature=temperature, logit_scale=logit_scale, softcap=softcap, backend=backend)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        sequence_ids: Tensor,
        ref_logps: Tensor,
        *,
        bias: Tensor | None = None,
        forbidden: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return linear_dpo_loss(
            hidden,
            weight,
            targets,
            sequence_ids,
            ref_logps,
            bias=bias,
            forbidden=forbidden,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class SimPOLoss(Face):
    """`simpo_loss` as a module."""

    def __init__(self, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(beta=beta, gamma=gamma, label_smoothing=label_smoothing)

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
        *,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return simpo_loss(
            chosen_logps,
            rejected_logps,
            chosen_lengths,
            rejected_lengths,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class ORPOLoss(Face):
    """`orpo_loss` as a module."""

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__(beta=beta)

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
        *,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return orpo_loss(
            chosen_logps,
            rejected_logps,
            chosen_lengths,
            rejected_lengths,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class CPOLoss(Face):
    """`cpo_loss` as a module."""

    def __init__(
        self, *, beta: float = 0.1, loss_type: str = "sigmoid", cpo_alpha: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(beta=beta, loss_type=loss_type, cpo_alpha=cpo_alpha, label_smoothing=label_smoothing)

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return cpo_loss(
            chosen_logps,
            rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )


class KTOLoss(Face):
    """`kto_loss` as a module."""

    def __init__(self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        super().__init__(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)

    def forward(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        desirable: Tensor,
        kl: Tensor,
        *,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Loss:
        return kto_loss(logps, ref_logps, desirable, kl, weights=weights, normalizer=normalizer, **self.options)
