"""nn.Module faces of the functions: numbers and choices at construction, tensors at the call.

The head's weight is an argument of the call and no parameter of these modules: it belongs to the model, where it may be
tied to the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .dpo import dpo_loss, linear_dpo_loss
from .kl import token_kl
from .logprob import linear_logprobs, selective_log_softmax
from .records import LogProbs, Loss


class _Face(nn.Module):
    """Keeps the keywords that every call gets."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SelectiveLogSoftmax(_Face):
    """`selective_log_softmax` as a module."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        return_entropy: bool = False,
        entropy_requires_grad: bool = False,
        inplace_backward: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            return_entropy=return_entropy,
            entropy_requires_grad=entropy_requires_grad,
            inplace_backward=inplace_backward,
            backend=backend,
        )

    def forward(self, logits: Tensor, targets: Tensor, *, mask: Tensor | None = None) -> LogProbs:
        return selective_log_softmax(logits, targets, mask=mask, **self.options)


class LinearLogProbs(_Face):
    """`linear_logprobs` as a module."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        return_entropy: bool = False,
        entropy_requires_grad: bool = False,
        return_log_sum_sq_probs: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            return_entropy=return_entropy,
            entropy_requires_grad=entropy_requires_grad,
            return_log_sum_sq_probs=return_log_sum_sq_probs,
            backend=backend,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        forbidden: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LogProbs:
        return linear_logprobs(hidden, weight, targets, bias=bias, forbidden=forbidden, mask=mask, **self.options)


class TokenKL(_Face):
    """`token_kl` as a module."""

    def __init__(self, *, estimator: str = "k3") -> None:
        super().__init__(estimator=estimator)

    def forward(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return token_kl(logprobs, ref_logprobs, **self.options)


class DPOLoss(_Face):
    """`dpo_loss` as a module."""

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


class LinearDPOLoss(DPOLoss):
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

    def forward(  # type: ignore[override]
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
