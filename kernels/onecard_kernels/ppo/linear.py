"""`linear_ppo_loss` and its operator: loss and gradients in one pass over the tiles of logits.

A token's coefficient, dL/dlogp, is known as soon as its log-probability is. So the forward computes the gradients too,
from the same tile of logits, and the backward scales them: two products with a frozen head, three with a trained one.
A token whose advantage or weight is 0 has one product. In the implementation `chunked`, whose tiles have whole rows of
logits, a clipped token has one product too, and the entropy bonus needs no product of its own.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, workspace
from ..double_backward import no_double_backward, no_forward_ad
from ..logprob import matmul
from ..logprob.online_softmax import (
    LogitGrad,
    Statistics,
    TileOutputs,
    add_gradients,
    derivative_,
    entropy_gradient,
    logprob_gradient,
)
from ..logprob.rows import Rows, blocks
from ..logprob.tile_bytes import IDS, STATISTICS, TileBytes, block_bytes
from ..logprob.tiles import Gradients, HeadTiles
from ..logprob.tuning import CHUNKED, choose
from ..records import Head, Loss, divisor_of, result_dtype
from .options import (
    OPTIONS_SCHEMA,
    SUMS,
    PolicyOptions,
    PolicyTerms,
    PolicyTokens,
    dtype_of,
    metrics_of,
    policy_options,
)

# Skipping rows without a gradient copies the others. Below this share of such rows, the copy costs more than it saves.
LEAST_SHARE_TO_SKIP = 1 / 8
OPTIONS = len(PolicyOptions._fields)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
    chunk_tokens: int | None = None,
) -> Loss:
    """Clipped policy loss from hidden states, without the `[tokens, V]` logits: `ppo_loss` of `linear_logprobs`.

    z = head(hidden);  logp_t = z_t[y_t] - log sum_v exp(z_t[v]);  entropy_t = -sum_v p_t[v] log p_t[v]

    "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347.

    Args:
        hidden: `[..., D]`, `[B, T, D]` or packed `[tokens, D]`.
        weight: `[V, D]`. Autocast acts on both as in `linear_logprobs`.
        targets: `[...]`, integer ids; `targets[t]` is the token that `hidden[t]` predicts. Any value (such as -100)
            is allowed where mask is 0.
        old_logprobs, advantages, mask: `[...]`, see `ppo_loss`.
        bias, temperature, logit_scale, softcap, forbidden: the head, see `linear_logprobs`.
        clip_low ... normalizer: see `ppo_loss`. The entropy has a gradient only if entropy_coef is not 0. That gradient
            costs one more GEMM in low_memory and none in chunked (`logprob.tuning`).
        backend: "auto", "triton" or "torch".
        chunk_tokens: see `linear_logprobs`.

    Returns:
        Loss, fp32 (fp64 if any floating point input is), with the metrics of `ppo_loss` and policy/entropy. Gradients
        are computed in the forward: two GEMMs with a frozen head, three with a trained one. A token whose advantage or
        weight is 0 has one GEMM; in chunked, a clipped one too.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    options = policy_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
    head = checks.make_head(bias, temperature, logit_scale, softcap, forbidden)
    differentiable = {"hidden": hidden, "weight": weight, "bias": bias}
    checks.reverse_mode_only("linear_ppo_loss", **differentiable, **tokens._asdict(), normalizer=normalizer)
    normalizer = checks.normalizer(normalizer)
    checks.integer("targets", targets)
    tokens.check("targets", targets, options)
    checks.linear(hidden, weight, targets, head, None)  # no mask: `tokens.check` has checked it
    chunk_tokens = checks.chunk_tokens(chunk_tokens)
    dispatch.resolve("linear_logprobs", backend, hidden.device)
    hidden, weight = matmul.under_autocast(hidden, weight)
    with_grad = torch.is_grad_enabled()
    total, sums, *_ = linear_ppo(
        *(hidden, weight, targets, *tokens.detached()),
        *(head.bias, head.forbidden, head.temperature, head.logit_scale, head.softcap),
        *options,
        [with_grad and x is not None and x.requires_grad for x in (hidden, weight, bias)],
        *(backend, chunk_tokens),
    )
    num_tokens = sums[-1].detach()  # the last of SUMS
    divisor = divisor_of(normalizer, num_tokens.clamp(min=1.0), total.dtype)
    metrics = metrics_of(sums.detach() / divisor, entropy=True, kl=ref_logprobs is not None)
    return Loss(total / divisor, metrics)


@torch.library.custom_op(
    "onecard::linear_ppo",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? old_logprobs, Tensor advantages, Tensor mask,"
    " Tensor? ref_logprobs, Tensor? weights, Tensor? bias, Tensor? forbidden, float temperature, float logit_scale,"
    f" float? softcap, {OPTIONS_SCHEMA}, bool[] needs, str backend, SymInt? chunk_tokens=None)"
    " -> (Tensor loss, Tensor sums, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
def linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the summed loss, the other sums in the order of SUMS, and the gradients of hidden, weight and bias.

    The sums and gradients are not divided by the normalizer. A gradient that is not needed is an empty tensor.
    """
    options, (needs, backend, *more) = PolicyOptions(*rest[:OPTIONS]), rest[OPTIONS:]
    differentiable, trained = any(needs), needs[1] or needs[2]
    with matmul.without_autocast(hidden):
        tokens = PolicyTokens(old_logprobs, advantages, mask, ref_logprobs, weights)
        loss_dtype, dtype = tokens.dtype_with(hidden, weight), result_dtype(hidden.dtype, weight.dtype)
        rows, num_active = _active_rows_first(Rows(targets.shape, mask), tokens, options)
        tokens, y = tokens.select_valid(rows), rows.select_valid(targets).long()
        checks.ids(y, weight.shape[0])
        head = Head(bias, temperature, logit_scale, softcap, forbidden)
        # The gradient of a trained head needs each token's coefficient: known only if a tile has whole rows of logits.
        only = CHUNKED if trained else None
        chunk_tokens = more[0] if more else None
        sizes = choose(weight.shape[0], dtype, hidden.device, only=only, chunk_tokens=chunk_tokens)
        # With a trained head dL/dz is formed in fp32 and cast. With a frozen head the exponentials themselves are an
        # input of the second product, so they are stored in its input dtype (exp_operand).
        exp_operand, entropy_term = differentiable and not trained, differentiable and options.entropy_in_loss
        tiles = HeadTiles(
            hidden, weight, head, rows.count, sizes, backend, exp_operand=exp_operand, entropy_term=entropy_term
        )
        assert tiles.has_whole_rows or not trained
        policy_terms = dispatch.implementation("policy_terms", backend, hidden.device)
        grads = Gradients(hidden, weight, rows, needs, dtype, stored_gradient_dtype(hidden.dtype))
        outputs = TileOutputs(entropy_sum=True, exponentials=differentiable)
        totals = None
        for piece in (*rows.chunks(tiles.rows, 0, num_active), *rows.chunks(tiles.rows, num_active)):
            h, with_grad = rows.take(hidden, piece).to(tiles.operand_dtype), differentiable and piece.start < num_active
            second_product = exp_operand and with_grad and not tiles.has_whole_rows
            stats, exp_times_head, term_times_head = tiles.sweep(h, y[piece], outputs, second_product=second_product)
            terms = policy_terms(stats.logprobs, stats.entropy, tokens.part(piece), options)
            totals = terms.totals if totals is None else totals + terms.totals
            if with_grad:
                _add_gradients(grads, piece, tiles, h, y[piece], stats, exp_times_head, term_times_head, terms, options)
            del (
                h,
                stats,
                exp_times_head,
                term_times_head,
                terms,
            )  # or they would live through the next sweep and the scatter
        del tiles, tokens
        sums = hidden.new_zeros(len(SUMS), dtype=dtype) if totals is None else totals
        grad_hidden, grad_weight, grad_bias = (
            hidden.new_empty(0) if x is None else x
            for x in (None if grads.hidden is None else rows.scatter(grads.hidden), grads.weight, grads.bias)
        )
        return (
            sums[0].to(loss_dtype, copy=True),
            sums[1:].to(loss_dtype, copy=True),
            grad_hidden,
            grad_weight,
            grad_bias,
        )


def _active_rows_first(rows: Rows, tokens: PolicyTokens, options: PolicyOptions) -> tuple[Rows, int]:
    """Put the rows first that can have a gradient (advantage and weight are not 0). Returns their number too."""
    active = rows.select_valid(tokens.advantages) != 0.0
    if options.kl_in_loss or options.entropy_in_loss:
        active = torch.ones_like(active)
    if tokens.weights is not None:
        active &= rows.select_valid(tokens.weights) != 0.0
    return (rows, rows.count) if bool(active.all()) else rows.chosen_first(active)


def stored_gradient_dtype(hidden: torch.dtype) -> torch.dtype:
    """Dtype of the hidden gradient until the backward scales it. The undivided gradient may exceed fp16's range."""
    return torch.float32 if hidden == torch.float16 else hidden


def _add_gradients(
    grads: Gradients,
    piece: slice,
    tiles: HeadTiles,
    h: Tensor,
    y: Tensor,
    stats: Statistics,
    exp_times_head: Tensor | None,
    term_times_head: Tensor | None,
    terms: PolicyTerms,
    options: PolicyOptions,
) -> None:
    """Add the gradients of tokens `piece`, from the results of their sweep over `tiles` and the loss's derivatives."""
    logit_grad, active = logprob_gradient(stats, terms.grad.to(tiles.dtype)), terms.grad != 0.0
    if options.entropy_in_loss:
        logit_grad = add_gradients(logit_grad, entropy_gradient(stats, terms.entropy_grad.to(tiles.dtype)))
        active |= terms.entropy_grad != 0.0
    if exp_times_head is not None:
        grads.write(piece, tiles.hidden_grad_(exp_times_head, term_times_head, logit_grad, y))
        return
    _, e, term = tiles.buffers(h.shape[0], tiles.vocabulary)
    if grads.weight is not None or grads.bias is not None:
        d = derivative_(e, term, logit_grad, y, 0, tiles.head.factor)
        grads.add(tiles, slice(0, tiles.vocabulary), tiles.weight, d, h)
        grads.write(piece)
        return
    # The second product, for `active` tokens alone: their rows are moved to the top of the tile, in place.
    index = active.nonzero().squeeze(1)
    if index.numel() == 0:
        return
    into: slice | Tensor = piece
    if index.numel() <= (1.0 - LEAST_SHARE_TO_SKIP) * len(active):
        for block in blocks(index.numel(), e.shape[1], e.element_size(), e.device):
            # index[i] >= i and ascending: no row is overwritten before it is read.
            e[block] = e.index_select(0, index[block])
            if term is not None:
                term[block] = term.index_select(0, index[block])
        logit_grad, y = LogitGrad._make(None if x is None else x[index] for x in logit_grad), y[index]
        e, term = e[: index.numel()], None if term is None else term[: index.numel()]
        into = index + piece.start
    if term is not None and logit_grad.term_coef is not None:
        # The coefficients are known, so log-prob and entropy terms are added before one product.
        for block in blocks(e.shape[0], e.shape[1], e.element_size(), e.device):
            both = e[block] * logit_grad.exp_coef[block].unsqueeze(1)
            e[block] = both.addcmul_(term[block], logit_grad.term_coef[block].unsqueeze(1))
        logit_grad = logit_grad._replace(exp_coef=torch.ones_like(logit_grad.exp_coef), term_coef=None)
    exp_times_head = matmul.project_back(e, tiles.weight, None, tiles.dtype, tiles.scratch)
    grads.write(into, tiles.hidden_grad_(exp_times_head, None, logit_grad, y))


@linear_ppo.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[4 + OPTIONS]
    dtype = dtype_of(hidden, weight, old_logprobs, advantages, ref_logprobs, weights)
    accumulated = result_dtype(hidden.dtype, weight.dtype)
    shapes = ((targets.numel(), hidden.shape[-1]), weight.shape, () if bias is None else bias.shape)
    dtypes = (stored_gradient_dtype(hidden.dtype), accumulated, accumulated)
    grads = (
        hidden.new_empty(shape, dtype=grad_dtype) if needed else hidden.new_empty(0)
        for shape, grad_dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(len(SUMS) - 1, dtype=dtype), *grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[0], inputs[1], inputs[8]
    ctx.shape, ctx.needs, ctx.inputs = hidden.shape, inputs[13 + OPTIONS], len(inputs)
    ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    # The backward checks that ZeRO-3 has not emptied a parameter. Only a leaf is kept for this check.
    ctx.weight = weight if ctx.needs[1] and weight.is_leaf else None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * ctx.inputs
    if grad is None:
        return none
    if ctx.weight is not None:
        checks.not_emptied(ctx.weight)
    grad_hidden, grad_weight, grad_bias = torch.ops.onecard.scale_linear_ppo(*ctx.saved_tensors, grad, *ctx.dtypes)
    return (
        grad_hidden.view(ctx.shape) if ctx.needs[0] else None,
        grad_weight if ctx.needs[1] else None,
        *none[2:8],
        grad_bias if ctx.needs[2] else None,
        *none[9:],
    )


linear_ppo.register_autograd(no_double_backward(_backward), setup_context=_setup)


@torch.library.custom_op("onecard::scale_linear_ppo", mutates_args=())
def scale_linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    factor: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward: each gradient times `factor` (0-d), cast to its input's dtype."""
    hidden, weight, bias = (
        torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
        for x, dtype in ((hidden, hidden_dtype), (weight, weight_dtype), (bias, bias_dtype))
    )
    return hidden, weight, bias


@scale_linear_ppo.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, dtype=dtype) for x, dtype in zip((hidden, weight, bias), dtypes, strict=True))


no_forward_ad("linear_ppo_loss", linear_ppo, scale_linear_ppo)


# ---------------------------------------------------------------------------------------------------------------------
# Peak bytes that the operators allocate inside (see `workspace`). `a` has an operator's arguments by name.


@workspace.formula("onecard::linear_ppo")
def _linear_ppo_bytes(device: torch.device, a: SimpleNamespace) -> int:
    grad_hidden, grad_weight, grad_bias = a.needs
    trained, differentiable, count = grad_weight or grad_bias, any(a.needs), a.targets.numel()
    with_entropy = differentiable and a.entropy_coef != 0.0
    tiles = TileBytes.of(
        *(device, a.hidden, a.weight, count),
        chunk_tokens=a.chunk_tokens,
        exp_operand=differentiable and not trained,
        entropy_term=with_entropy,
        only=CHUNKED if trained else None,
    )
    # the terms of the entropy's sum take memory of their own, unless the buffer of the entropy term has their dtype
    term_in_buffer = with_entropy and (trained or tiles.operand_itemsize == tiles.accumulator_itemsize)
    in_pass = tiles.exp_pass(a.backend, entropy_term=not term_in_buffer, slope=differentiable and a.softcap is not None)
    grad_rows = tiles.hidden_rows * tiles.accumulator_itemsize  # the hidden gradient of a chunk's tokens
    stored = stored_gradient_dtype(a.hidden.dtype)
    cast_grad_rows = tiles.hidden_rows * stored.itemsize * (stored.itemsize != tiles.accumulator_itemsize)
    if not differentiable:
        sweep = in_pass
    elif trained:
        cast_tile = tiles.logits * tiles.operand_itemsize * (tiles.operand_itemsize != tiles.accumulator_itemsize)
        sweep = max(in_pass, grad_rows * grad_hidden + max(cast_tile, cast_grad_rows * grad_hidden))
    elif tiles.count == 1:
        size = tiles.logits * tiles.operand_itemsize * with_entropy
        first_block = block_bytes(device, tiles.chunk, tiles.columns, tiles.operand_itemsize) * with_entropy
        # the last block's temporary in `_add_gradients` is still allocated during the product
        last_block = size - first_block * (math.ceil(size / first_block) - 1) if size else 0
        sweep = max(
            in_pass,
            first_block + min(first_block, size - first_block),
            last_block + grad_rows + max(tiles.target_rows, cast_grad_rows),
        )
    else:
        sweep = grad_rows * (1 + with_entropy) + max(in_pass, tiles.target_rows, cast_grad_rows)
    scattered = a.hidden.numel() * stored.itemsize * grad_hidden
    # fp32 old log-probs, advantages and so on; a bool mask; targets and rows; the bool mask of active tokens
    per_token = (2 + (a.ref_logprobs is not None) + (a.weights is not None)) * 4 + 1 + 2 * IDS + 1
    sweep += tiles.per_token(STATISTICS + 8)  # the statistics, and the loss's terms and derivatives
    return count * per_token + max(tiles.buffers + tiles.chunk_bytes(a.hidden, masked=True, sweep=sweep), scattered)


@workspace.formula("onecard::scale_linear_ppo")
def _scale_bytes(device: torch.device, a: SimpleNamespace) -> int:
    """On a CPU, `torch.mul` makes a temporary in the wider dtype before the cast."""
    if device.type != "cpu":
        return 0
    pairs = ((a.hidden, a.hidden_dtype), (a.weight, a.weight_dtype), (a.bias, a.bias_dtype))
    sizes = [x.numel() * dtype.itemsize for x, dtype in pairs]
    wide = [x.numel() * x.dtype.itemsize * (x.dtype != dtype) for x, dtype in pairs]
    return max(sum(sizes[: index + 1]) + wide[index] for index in range(len(sizes))) - sum(sizes)
