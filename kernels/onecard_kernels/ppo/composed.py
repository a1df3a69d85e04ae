"""logits_ppo_loss in torch: the loss of the log-probabilities, one function after the other."""

from __future__ import annotations

from torch import Tensor

from ..logprob.selective import selective_log_softmax
from ..records import Loss
from .options import PolicyOptions, PolicyTokens
from .reference import ppo_loss


def logits_ppo_loss(
    logits: Tensor,
    targets: Tensor,
    tokens: PolicyTokens,
    options: PolicyOptions,
    temperature: float,
    normalizer: float | Tensor | None,
) -> Loss:
    policy = selective_log_softmax(
        logits,
        targets,
        temperature=temperature,
        mask=tokens.mask,
        return_entropy=True,
        entropy_requires_grad=options.entropy_in_loss,
        inplace_backward=False,
    )
    return ppo_loss(policy.logprobs, policy.entropy, tokens, options, normalizer)
