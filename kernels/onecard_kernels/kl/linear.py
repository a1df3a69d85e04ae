"""linear_kl: the exact KL divergence over the vocabulary, from the hidden states of policy and reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, workspace
from ..double_backward import no_double_backward, no_forward_ad
from ..logprob import matmul
from ..logprob.rows import Rows
from ..logprob.tile_bytes import IDS, block_bytes, by_triton, even_chunk
from ..logprob.tuning import CHUNKED, choose
from ..records import Head, result_dtype


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
    chunk_tokens: int | None = None,
) -> Tensor:
    """Exact KL(pi || ref) per token over the whole vocabulary; the `[tokens, V]` logits never exist.

    p = softmax(head(hidden));  q = softmax(head(ref_hidden));  KL_t = sum_v p_tv (log p_tv - log q_tv)
    dKL_t/dh_t = sum_v p_tv (log p_tv - log q_tv - KL_t) W_v  (times the head's derivative), computed in the forward

    "On Information and Sufficiency", Kullback and Leibler, 1951 (https://doi.org/10.1214/aoms/1177729694). Unlike
    `token_kl`, which estimates the KL from the sampled token, it has no variance. It costs a product with the head for
    the policy and one for the reference, and a third with a gradient.

    Args:
        hidden: `[..., D]`, the policy's hidden states, any floating dtype.
        ref_hidden: `[..., D']`, the reference's hidden states, a constant. D' is D without a `ref_weight`.
        weight: `[V, D]`, the head, a constant: only `hidden` gets a gradient. Autocast acts on hidden states and heads
            as in `linear_logprobs`.
        ref_weight: `[V, D']`, the reference's head; None: the policy's head, read once for both.
        ref_bias: `[V]`; None: the policy's bias with the policy's head, no bias with a `ref_weight`.
        bias, temperature, logit_scale, softcap, forbidden: the head, see `linear_logprobs`; all but the bias are
            also the reference's.
        mask: `[...]`, bool or 0/1. Masked tokens give 0 with zero gradient and cost nothing.
        backend: "auto", "triton" or "torch".
        chunk_tokens: rows of logits in memory at a time, half of them the reference's; see `linear_logprobs`.

    Returns:
        fp32 `[...]` in nats (fp64 in, fp64 out), never negative. Infinite, with zero gradient, where the reference
        excludes a token that the policy does not. Forbidden tokens count as 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    constants = {"ref_hidden": ref_hidden, "weight": weight, "ref_weight": ref_weight, "bias": bias}
    constants["ref_bias"] = ref_bias
    checks.reverse_mode_only("linear_kl", hidden=hidden, **constants)
    head = checks.make_head(bias, temperature, logit_scale, softcap, forbidden)
    checks.product("hidden", hidden, "weight", weight)
    checks.head(head, weight.shape[0], hidden)
    _check_reference(hidden, ref_hidden, weight, ref_weight, ref_bias)
    if mask is not None:
        checks.mask(mask, "hidden's tokens", hidden[..., 0])
    _check_constants(constants)
    chunk_tokens = checks.chunk_tokens(chunk_tokens)
    dispatch.resolve("linear_kl", backend, hidden.device)
    if ref_weight is None and ref_bias is None:
        ref_bias = bias
    hidden, ref_hidden, weight, *other = matmul.under_autocast(
        hidden, ref_hidden, weight, *(() if ref_weight is None else (ref_weight,))
    )
    ref_weight = other[0] if other else None
    kl, _ = torch.ops.onecard.linear_kl(
        *(hidden, ref_hidden, weight, ref_weight, mask, bias, ref_bias, forbidden),
        *(head.temperature, head.logit_scale, head.softcap),
        torch.is_grad_enabled() and hidden.requires_grad,
        *(backend, chunk_tokens),
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
    """Raise if an input other than `hidden` requires a gradient."""
    for name, value in given.items():
        if torch.is_grad_enabled() and value is not None and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, expected a constant: linear_kl has a gradient for hidden only "
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
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(KL, dKL/dh)"""
    with matmul.without_autocast(hidden):
        rows, head = Rows(hidden.shape[:-1], mask), Head(bias, temperature, logit_scale, softcap, forbidden)
        kl = hidden.new_empty(rows.count, dtype=result_dtype(hidden.dtype, weight.dtype))
        by_hidden = hidden.new_empty(rows.count, hidden.shape[-1]) if direction else None
        _kl_rows(hidden, ref_hidden, weight, ref_weight, rows, head, ref_bias, kl, by_hidden, backend, chunk_tokens)
        return rows.scatter(kl), hidden.new_empty(0) if by_hidden is None else rows.scatter(by_hidden)


def _kl_rows(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor | None,
    rows: Rows,
    head: Head,
    ref_bias: Tensor | None,
    kl: Tensor,
    by_hidden: Tensor | None,
    backend: str,
    chunk_tokens: int | None,
) -> None:
    """Fill `kl` and `by_hidden` (dKL/dh) in chunks of rows. One buffer has the policy's logits, then the reference's.

    With one head for both, a chunk takes one product.
    """
    ref_weight = weight if ref_weight is None else ref_weight
    vocabulary, dtype = weight.shape[0], kl.dtype
    operand = matmul.operand_dtype(hidden.dtype, weight.dtype, dtype, hidden.device)
    ref_operand = matmul.operand_dtype(ref_hidden.dtype, ref_weight.dtype, dtype, hidden.device)
    sizes = choose(vocabulary, dtype, hidden.device, only=CHUNKED, chunk_tokens=chunk_tokens)
    step = max(1, min(sizes.rows // 2, rows.count))
    buffer = hidden.new_empty(2 * step * vocabulary, dtype=dtype)
    shared = ref_weight is weight and ref_hidden.dtype == hidden.dtype
    scratch = matmul.scratch_for(weight, operand, vocabulary)
    ref_scratch = scratch if shared else matmul.scratch_for(ref_weight, ref_operand, vocabulary)
    kl_pass_ = dispatch.implementation("linear_kl", "torch" if dtype == torch.float64 else backend, hidden.device)
    for piece in rows.chunks(step):
        n = piece.stop - piece.start
        logits = buffer[: 2 * n * vocabulary].view(2 * n, vocabulary)
        h = rows.take(hidden, piece).to(operand)
        ref_h = rows.take(ref_hidden, piece).to(ref_operand)
        if shared:
            matmul.project(torch.cat([h, ref_h]), weight, logits, scratch)
        else:
            matmul.project(h, weight, logits[:n], scratch)
            matmul.project(ref_h, ref_weight, logits[n:], ref_scratch)
        out = None
        if by_hidden is not None:
            out = logits[:n] if operand == dtype else torch.empty_like(logits[:n], dtype=operand)
        kl[piece] = kl_pass_(logits[:n], logits[n:], head, ref_bias=ref_bias, out=out)
        if by_hidden is not None and out is not None:
            by_hidden[piece] = matmul.project_back(out, weight, None, dtype, scratch).to(by_hidden.dtype)


@_forward.register_fake
def _(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens = hidden.shape[:-1].numel()
    dtype = result_dtype(hidden.dtype, weight.dtype)
    return hidden.new_empty(tokens, dtype=dtype), hidden.new_empty((tokens, hidden.shape[-1]) if rest[8] else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    kl, direction = output
    ctx.shape, ctx.inputs = inputs[0].shape, len(inputs)
    ctx.mark_non_differentiable(direction)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[4], kl.isfinite(), direction)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.inputs
    mask, finite, direction = ctx.saved_tensors
    nothing = direction.new_empty(0)
    by_hidden = torch.ops.onecard.scale_directions(mask, finite, direction, nothing, grad, None)
    return by_hidden.view(ctx.shape), *(None,) * (ctx.inputs - 1)


_forward.register_autograd(no_double_backward(_backward), setup_context=_setup)
no_forward_ad("linear_kl", _forward)


KL_BLOCKS = 5  # tensors of a block's size that the torch implementation has at a time: p, q, and terms of the sum


@workspace.formula("onecard::linear_kl")
def _forward_bytes(device: torch.device, a: SimpleNamespace) -> int:
    """Temporary memory of the operator in bytes (see `workspace`). `a` has its arguments by name."""
    hidden, ref_hidden, weight, direction = a.hidden, a.ref_hidden, a.weight, a.direction
    ref_weight = weight if a.ref_weight is None else a.ref_weight
    dtype, width = result_dtype(hidden.dtype, weight.dtype), hidden.shape[-1]
    count, vocabulary = hidden.shape[:-1].numel(), weight.shape[0]
    sizes = choose(vocabulary, dtype, device, only=CHUNKED, chunk_tokens=a.chunk_tokens)
    step = max(1, min(sizes.rows // 2, count))
    operand = matmul.operand_dtype(hidden.dtype, weight.dtype, dtype, device)
    ref_operand = matmul.operand_dtype(ref_hidden.dtype, ref_weight.dtype, dtype, device)
    shared, masked = a.ref_weight is None and ref_hidden.dtype == hidden.dtype, a.mask is not None
    upcast = min(matmul.SCRATCH_ROWS, vocabulary)
    scratch = upcast * width * operand.itemsize * (weight.dtype != operand)
    if not shared:
        scratch += upcast * ref_weight.shape[1] * ref_operand.itemsize * (ref_weight.dtype != ref_operand)
    piece = even_chunk(count, step)
    rows = piece * width * operand.itemsize * (masked or hidden.dtype != operand)
    rows += piece * ref_hidden.shape[-1] * ref_operand.itemsize * (masked or ref_hidden.dtype != ref_operand)
    both = piece * 2 * width * operand.itemsize * shared
    narrow = piece * vocabulary * operand.itemsize * (direction and operand != dtype)
    block = block_bytes(device, piece, vocabulary, dtype.itemsize)
    bools = block // dtype.itemsize
    in_rows = 0
    if not by_triton(device, a.backend, dtype):
        in_rows = block * (KL_BLOCKS + (direction and a.softcap is not None)) + bools
    product = piece * width * (dtype.itemsize + hidden.dtype.itemsize * (hidden.dtype != dtype)) * direction
    unmasked = count * dtype.itemsize + count * width * hidden.dtype.itemsize * direction
    buffers = (count * IDS if masked else 0) + 2 * step * vocabulary * dtype.itemsize + scratch
    return max(buffers + rows + max(both, narrow + max(in_rows, product)), unmasked if masked else 0)
