"""Faces of the log-probabilities and of their divergences."""

from __future__ import annotations

from torch import Tensor

from ..kl import linear_kl, token_kl
from ..logprob import linear_logprobs, selective_log_softmax
from ..records import LogProbs
from .face import Face


class SelectiveLogSoftmax(Face):
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


class LinearLogProbs(Face):
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


class LinearKL(Face):
    """`linear_kl` as a module."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature=temperature, logit_scale=logit_scale, softcap=softcap, backend=backend)

    def forward(
        self,
        hidden: Tensor,
        ref_hidden: Tensor,
        weight: Tensor,
        *,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        bias: Tensor | None = None,
        forbidden: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return linear_kl(
            hidden,
            ref_hidden,
            weight,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            bias=bias,
            forbidden=forbidden,
            mask=mask,
            **self.options,
        )


class TokenKL(Face):
    """`token_kl` as a module."""

    def __init__(self, *, estimator: str = "k3") -> None:
        super().__init__(estimator=estimator)

    def forward(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return token_kl(logprobs, ref_logprobs, **self.options)
