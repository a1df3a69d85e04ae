"""logits_ppo_loss in torch: the loss of the log-probabilities, one function after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..logprob.selective import selective_log_softmax
from ..records import Loss
from .reference import ppo_loss


def logits_ppo_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    entropy_coef: float,
    **options: Any,
) -> Loss:
    policy = selective_log_softmax(
        logits,
        targets,
        temperature=temperature,
        mask=mask,
        return_entropy=True,
        entropy_requires_grad=entropy_coef != 0.0,
        inplace_backward=False,
    )
    return ppo_loss(
        policy.logprobs,
        old_logprobs,
        advantages,
        mask,
        entropy=policy.entropy,
        entropy_coef=entropy_coef,
        **options,
    )
