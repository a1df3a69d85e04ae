"""The plain formulas, in the inputs' own dtype, with the whole logits in memory. For reading and for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import Head, LogProbs
from .passes import result_dtype


def selective_log_softmax(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    entropy_requires_grad: bool = False,
    return_log_sum_sq_probs: bool = False,
) -> LogProbs:
    """log softmax(logits / temperature)[targets], its entropy, and log sum_v p_v^2."""
    valid = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
    dtype = result_dtype(logits.dtype)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logp.gather(-1, targets.long().masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    # A target without any probability is a constant -inf: it has no gradient, rather than one towards nothing.
    chosen = chosen.masked_fill(chosen == float("-inf"), float("-inf"))

    def out(value: Tensor) -> Tensor:
        return value.to(dtype).masked_fill(~valid, 0.0)

    entropy = lssp = None
    if return_entropy or entropy_requires_grad:
        held = logp if entropy_requires_grad else logp.detach()
        held = held.masked_fill(held == float("-inf"), 0.0)  # p log p is 0 at p = 0
        p = logp.exp() if entropy_requires_grad else logp.detach().exp()
        entropy = out(-(p * held).sum(-1))
    if return_log_sum_sq_probs:
        lssp = out(torch.logsumexp(2 * logp.detach(), dim=-1))
    return LogProbs(out(chosen), entropy, lssp)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    entropy_requires_grad: bool = False,
    return_log_sum_sq_probs: bool = False,
) -> LogProbs:
    """The same of the head's logits, `Head.transform(hidden @ weight.T)`."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = Head(bias, temperature, logit_scale, softcap, forbidden).transform(hidden.to(dtype) @ weight.to(dtype).T)
    return selective_log_softmax(
        logits,
        targets,
        mask=mask,
        return_entropy=return_entropy,
        entropy_requires_grad=entropy_requires_grad,
        return_log_sum_sq_probs=return_log_sum_sq_probs,
    )
