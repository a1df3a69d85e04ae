"""Logits or hidden states to per-token log-probabilities and entropies."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from ..records import LogProbs
from . import ops
from .products import under_autocast

__all__ = ["linear_logprobs", "selective_log_softmax"]


def selective_log_softmax(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    entropy_requires_grad: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> LogProbs:
    """Log-probabilities of the target tokens, without a second tensor of the logits' size.

    logp_t = z_t[y_t] - log sum_v exp(z_t[v]),  z = logits / temperature
    H_t    = -sum_v p_t[v] log p_t[v]

    "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", Williams, 1992, for
    what policy gradients do with logp and H (https://link.springer.com/article/10.1007/BF00992696).

    Args:
        logits: `[..., V]`, any floating dtype. Arithmetic is fp32 for fp16, bf16 and fp32, fp64 for fp64.
        targets: `[...]`, integer ids; `targets[t]` is the token that `logits[t]` predicts.
        temperature: divides the logits.
        mask: `[...]`, bool or 0/1. Masked tokens give 0 with zero gradient; their targets may be anything (-100).
            Without a mask a target of -100 is an error: the caller would count it as a token.
        return_entropy: also give H, detached.
        entropy_requires_grad: also give H, with its gradient.
        inplace_backward: write the gradient into the logits' storage. Saves that much memory; the logits are gone after
            the backward, and a second backward raises RuntimeError. Under torch.compile it has no effect.
        backend: "auto", "triton" or "torch".

    Returns:
        LogProbs of fp32 tensors `[...]` in nats (fp64 for fp64 logits). `log_sum_sq_probs` is None. A target whose
        logit is -inf gives logp -inf with zero gradient. `logits.grad` has the logits' dtype.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.reverse_mode("selective_log_softmax", logits=logits)
    temperature = checks.plain(temperature)
    checks.logits(logits, targets, temperature, mask)
    if inplace_backward and any(n > 1 and stride == 0 for n, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("logits is expanded (stride 0), expected memory of its own for inplace_backward=True")
    result: LogProbs = dispatch.implementation("selective_log_softmax", backend, logits.device)(
        logits,
        targets,
        temperature=temperature,
        mask=mask,
        return_entropy=return_entropy,
        entropy_requires_grad=entropy_requires_grad,
        inplace_backward=inplace_backward,
    )
    return result


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
    backend: str = "auto",
) -> LogProbs:
    """Log-probabilities of the target tokens from hidden states; the `[tokens, V]` logits never exist.

    z = (h @ W.T + bias) * logit_scale;  z = softcap * tanh(z / softcap);  z = z / temperature;  z[forbidden] = -inf
    logp_t = z_t[y_t] - log sum_v exp(z_t[v])
    H_t    = -sum_v p_t[v] log p_t[v]

    With a frozen head (no gradient asked for `weight` and `bias`) the direction dlogp_t/dh_t = W[y_t] - sum_v p_tv W_v
    is formed in the forward, two GEMMs in all, and the backward of any loss scales it by dL/dlogp_t.

    Softcap: "Gemma 2", https://arxiv.org/abs/2408.00118. log_sum_sq_probs: "WPO", https://arxiv.org/abs/2406.11827.

    Args:
        hidden: `[..., D]`, any floating dtype. Any strides: `hidden[:, :-1]` is not copied.
        weight: `[V, D]`; bf16, fp16, fp32 or fp64, not necessarily hidden's. Logits and softmax are fp32 (fp64 if
            either is fp64). Under autocast hidden and weight are cast to its dtype, as for a linear layer, and the
            products still accumulate in fp32; torch.autocast(enabled=False) around the call keeps them as they are.
        targets: `[...]`, integer ids; `targets[t]` is the token that `hidden[t]` predicts.
        bias: `[V]`, finite.
        temperature, logit_scale, softcap: numbers, in the order of the equation.
        forbidden: bool `[V]`, tokens that cannot be sampled (padded rows of the head).
        mask: `[...]`, bool or 0/1. Masked tokens give 0 with zero gradient and cost nothing; their targets may be
            anything (-100). Without a mask a target of -100 is an error: the caller would count it as a token.
        return_entropy: also give H, detached. Costs no GEMM.
        entropy_requires_grad: also give H, with its gradient. Costs one more GEMM.
        return_log_sum_sq_probs: also give log sum_v p_v^2, detached.
        backend: "auto", "triton" or "torch".

    Returns:
        LogProbs of fp32 tensors `[...]` in nats (fp64 in, fp64 out). A forbidden target gives logp -inf with zero
        gradient; entropies count forbidden tokens as 0. Gradients have their inputs' dtypes; weight and bias gradients
        are summed in fp32.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.reverse_mode("linear_logprobs", hidden=hidden, weight=weight, bias=bias)
    head = checks.plain_head(bias, temperature, logit_scale, softcap, forbidden)
    checks.linear(hidden, weight, targets, head, mask)
    dispatch.resolve("linear_logprobs", backend, hidden.device)
    hidden, weight = under_autocast(hidden, weight)
    return ops.linear_logprobs(
        hidden,
        weight,
        targets,
        head=head,
        mask=mask,
        return_entropy=return_entropy,
        entropy_requires_grad=entropy_requires_grad,
        return_log_sum_sq_probs=return_log_sum_sq_probs,
        backend=backend,
    )
