"""The exact KL divergence over the vocabulary, from the hidden states of policy and reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from ..logprob import products
from ..logprob.ops import linear_of
from ..logprob.passes import Rows, result_dtype
from ..logprob.plans import CHUNKED
from ..logprob.tiles import Linear
from ..once import no_forward_ad, once
from ..records import Head


def linear_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    *,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact KL(pi || ref) per token over the whole vocabulary; the `[tokens, V]` logits never exist.

    p = softmax(head(hidden));  q = softmax(head(ref_hidden));  KL_t = sum_v p_tv (log p_tv - log q_tv)
    dKL_t/dh_t = sum_v p_tv (log p_tv - log q_tv - KL_t) W_v  (times the head's derivative), formed in the forward

    "On Information and Sufficiency", Kullback and Leibler, 1951 (https://doi.org/10.1214/aoms/1177729694). Where
    `token_kl` estimates it from the sampled token, this has no variance, and costs a product with the head for each of
    the two; with a gradient one more.

    Args:
        hidden: `[..., D]`, the policy's, any floating dtype.
        ref_hidden: `[..., D]`, the reference's, a constant.
        weight: `[V, D]`, the head, a constant: only `hidden` gets a gradient. Autocast acts on hidden states and heads
            as in `linear_logprobs`.
        ref_weight: `[V, D']`, the reference's head if it is another one; None: the same head, read once for both.
        ref_bias: `[V]`; None: the policy's bias with the policy's head, no bias with a `ref_weight`.
        bias, temperature, logit_scale, softcap, forbidden: the head, see `linear_logprobs`; all but the bias serve the
            reference too.
        mask: `[...]`, bool or 0/1. Masked tokens give 0 with zero gradient and cost nothing.
        backend: "auto", "triton" or "torch".

    Returns:
        fp32 `[...]` in nats (fp64 in, fp64 out), never negative. Infinite, with zero gradient, where the reference
        excludes a token that the policy does not. Forbidden tokens count as 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    constants = {"ref_hidden": ref_hidden, "weight": weight, "ref_weight": ref_weight, "bias": bias}
    constants["ref_bias"] = ref_bias
    checks.reverse_mode("linear_kl", hidden=hidden, **constants)
    head = checks.plain_head(bias, temperature, logit_scale, softcap, forbidden)
    checks.product("hidden", hidden, "weight", weight)
    checks.head(head, weight.shape[0], hidden)
    _check_reference(hidden, ref_hidden, weight, ref_weight, ref_bias)
    if mask is not None:
        checks.mask(mask, "hidden's tokens", hidden[..., 0])
    _check_constants(constants)
    dispatch.resolve("linear_kl", backend, hidden.device)
    if ref_weight is None and ref_bias is None:
        ref_bias = bias
    hidden, ref_hidden, weight, *other = products.under_autocast(
        hidden, ref_hidden, weight, *(() if ref_weight is None else (ref_weight,))
    )
    ref_weight = other[0] if other else None
    kl, _ = torch.ops.onecard.linear_kl(
        *(hidden, ref_hidden, weight, ref_weight, mask, bias, ref_bias, forbidden),
        *(head.temperature, head.logit_scale, head.softcap),
        torch.is_grad_enabled() and hidden.requires_grad,
        backend,
    )
    return kl.view(hidden.shape[:-1])


def _check_reference(
    hidden: Tensor, ref_hidden: Tensor, weight: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> None:
    other = ("weight", weight) if ref_weight is None else ("ref_weight", ref_weight)
    checks.tensor("ref_hidden", ref_hidden)
    checks.device("ref_hidden", ref_hidden, "hidden", hidden)
    checks.product("ref_hidden", ref_hidden, *other)
    ours, theirs = result_dtype(hidden.dtype, weight.dtype), result_dtype(ref_hidden.dtype, other[1].dtype)
    if ours != theirs:
        raise TypeError(
            f"ref_hidden {ref_hidden.dtype} with {other[0]} {other[1].dtype} gives logits of {theirs}, expected {ours} "
            f"as hidden {hidden.dtype} with weight {weight.dtype}"
        )
    checks.shape("ref_hidden", ref_hidden, (*hidden.shape[:-1], ref_hidden.shape[-1]), "hidden's tokens")
    if ref_weight is not None and ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight has shape {tuple(ref_weight.shape)}, expected {weight.shape[0]} rows, as weight has"
        )
    checks.bias("ref_bias", ref_bias, weight.shape[0], hidden)


def _check_constants(given: dict[str, Tensor | None]) -> None:
    """A gradient that is asked for and silently not given would be worse than an error."""
    for name, value in given.items():
        if torch.is_grad_enabled() and value is not None and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, expected a constant: linear_kl differentiates by hidden alone "
                f"(pass {name}.detach())"
            )


@torch.library.custom_op("onecard::linear_kl", mutates_args=())
def _forward(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    forbidden: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    direction: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        rows = Rows(hidden.shape[:-1], mask)
        head = Head(bias, temperature, logit_scale, softcap, forbidden)
        linear = linear_of(hidden, weight, head, backend, only=CHUNKED)
        reference = linear_of(ref_hidden, weight if ref_weight is None else ref_weight, head, backend, only=CHUNKED)
        kl = hidden.new_empty(rows.count, dtype=linear.dtype)
        kept = hidden.new_empty(rows.count, hidden.shape[-1]) if direction else None
        _sweep(hidden, ref_hidden, rows, linear, reference, ref_bias, kl, kept)
        return rows.spread(kl), hidden.new_empty(0) if kept is None else rows.spread(kept)


def _sweep(
    hidden: Tensor,
    ref_hidden: Tensor,
    rows: Rows,
    linear: Linear,
    reference: Linear,
    ref_bias: Tensor | None,
    kl: Tensor,
    direction: Tensor | None,
) -> None:
    """Chunks of whole rows, policy above reference in one buffer; with one head for both, one product for both."""
    step = max(1, min(linear.plan.rows // 2, rows.count))
    both = hidden.new_empty(2 * step * linear.vocabulary, dtype=linear.dtype)
    shared = reference.weight is linear.weight and ref_hidden.dtype == hidden.dtype
    scratch = products.scratch_for(linear.weight, linear.operand, linear.vocabulary)
    ref_scratch = scratch if shared else products.scratch_for(reference.weight, reference.operand, linear.vocabulary)
    backend = "torch" if linear.dtype == torch.float64 else linear.backend
    kl_pass_ = dispatch.implementation("linear_kl", backend, hidden.device)
    for piece in rows.chunks(step):
        n = piece.stop - piece.start
        logits = both[: 2 * n * linear.vocabulary].view(2 * n, linear.vocabulary)
        h = rows.take(hidden, piece).to(linear.operand)
        ref_h = rows.take(ref_hidden, piece).to(reference.operand)
        if shared:
            products.project(torch.cat([h, ref_h]), linear.weight, logits, scratch)
        else:
            products.project(h, linear.weight, logits[:n], scratch)
            products.project(ref_h, reference.weight, logits[n:], ref_scratch)
        out = None
        if direction is not None:
            out = logits[:n] if linear.operand == linear.dtype else torch.empty_like(logits[:n], dtype=linear.operand)
        kl[piece] = kl_pass_(logits[:n], logits[n:], linear.head, ref_bias=ref_bias, out=out)
        if direction is not None and out is not None:
            direction[piece] = products.back(out, linear.weight, None, linear.dtype, scratch).to(direction.dtype)


@_forward.register_fake
def _(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens = hidden.shape[:-1].numel()
    dtype = result_dtype(hidden.dtype, weight.dtype)
    return hidden.new_empty(tokens, dtype=dtype), hidden.new_empty((tokens, hidden.shape[-1]) if rest[-2] else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    kl, direction = output
    ctx.shape = inputs[0].shape
    ctx.mark_non_differentiable(direction)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[4], kl.isfinite(), direction)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    mask, possible, direction = ctx.saved_tensors
    nothing = direction.new_empty(0)
    by_hidden = torch.ops.onecard.scale_directions(mask, possible, direction, nothing, grad, None)
    return by_hidden.view(ctx.shape), *(None,) * 12


_forward.register_autograd(once(_backward), setup_context=_setup)
no_forward_ad("linear_kl", _forward)
