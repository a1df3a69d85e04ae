"""linear_logprobs: log-probabilities from hidden states, as registered operators with gradients.

The operators are opaque to torch.compile. Their outputs are flat, of all tokens (zeros where the mask is 0), so that
shapes do not depend on the mask's values. An output that was not requested is an empty tensor.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, launch, workspace
from ..double_backward import no_double_backward, no_forward_ad
from ..records import Head, LogProbs, result_dtype
from . import matmul
from .online_softmax import (
    SHIFT,
    SLOTS,
    LogitGrad,
    Statistics,
    TileOutputs,
    add_gradients,
    derivative_,
    entropy_gradient,
    logprob_gradient,
    new_state,
)
from .rows import Rows, blocks
from .tile_bytes import STATISTICS, TileBytes, block_bytes, id_bytes
from .tiles import Gradients, HeadTiles
from .tuning import TILED, choose

# Gradients that autograd will need: none; that of hidden (computed in the forward); those of weight or bias too
# (computed in the backward, from logits that are computed again).
FORWARD, FROZEN, TRAINED = "forward", "frozen", "trained"
SAVED = 6  # numbers of each token for the backward of a trained head: the fields of Statistics but the last


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
    chunk_tokens: int | None = None,
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
        temperature, logit_scale, softcap: numbers, applied as in the equation.
        forbidden: bool `[V]`, tokens that cannot be sampled (padded rows of the head).
        mask: `[...]`, bool or 0/1. Masked tokens give 0 with zero gradient and cost nothing; their targets may be
            anything (-100). Without a mask a target of -100 is an error: the caller would count it as a token.
        return_entropy: also give H, detached. Costs no GEMM.
        entropy_requires_grad: also give H, with its gradient. Costs one more GEMM.
        return_log_sum_sq_probs: also give log sum_v p_v^2, detached.
        backend: "auto", "triton" or "torch".
        chunk_tokens: tokens whose logits are in memory at a time; None: the device's default (`logprob.tuning`).

    Returns:
        LogProbs of fp32 tensors `[...]` in nats (fp64 in, fp64 out). A forbidden target gives logp -inf with zero
        gradient; entropies count forbidden tokens as 0. Gradients have their inputs' dtypes; weight and bias gradients
        are summed in fp32.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.reverse_mode_only("linear_logprobs", hidden=hidden, weight=weight, bias=bias)
    head = checks.make_head(bias, temperature, logit_scale, softcap, forbidden)
    checks.linear(hidden, weight, targets, head, mask)
    chunk_tokens = checks.chunk_tokens(chunk_tokens)
    dispatch.resolve("linear_logprobs", backend, hidden.device)
    hidden, weight = matmul.under_autocast(hidden, weight)
    mode = FORWARD
    if torch.is_grad_enabled():
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        mode = TRAINED if trained else FROZEN if hidden.requires_grad else FORWARD
    entropy = return_entropy or entropy_requires_grad
    logprobs, entropies, log_sum_sq, *_ = torch.ops.onecard.linear_logprobs(
        *(hidden, weight, targets, mask),
        *(head.bias, head.forbidden, head.temperature, head.logit_scale, head.softcap),
        *(entropy, entropy_requires_grad, return_log_sum_sq_probs, mode, backend, chunk_tokens),
    )
    shape = targets.shape
    # The views are made here: autograd refuses `x.mul_()` on a view that a custom operator returns.
    return LogProbs(
        logprobs.view(shape),
        entropies.view(shape) if entropy else None,
        log_sum_sq.view(shape) if return_log_sum_sq_probs else None,
    )


@torch.library.custom_op("onecard::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    entropy_grad: bool,
    sum_sq: bool,
    mode: str,
    backend: str,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, log_sum_sq_probs, dlogp/dh, dH/dh, [SAVED, tokens] for the backward of a trained head)"""
    with matmul.without_autocast(hidden):
        rows, head = Rows(targets.shape, mask), Head(bias, temperature, logit_scale, softcap, forbidden)
        y = rows.select_valid(targets).long()
        checks.ids(y, weight.shape[0])
        results, saved = _forward_rows(
            hidden, weight, y, rows, head, entropy, entropy_grad, sum_sq, mode, backend, chunk_tokens
        )
        dtypes = (*(saved.dtype,) * 3, *(hidden.dtype,) * 2)
        logprobs, entropies, log_sum_sq, *directions = (
            hidden.new_empty(0, dtype=dtype) if x is None else rows.scatter(x)
            for x, dtype in zip(results, dtypes, strict=True)
        )
        saved = rows.scatter(saved.T).T.contiguous() if mode == TRAINED else saved.new_empty(0)
        return logprobs, entropies, log_sum_sq, directions[0], directions[1], saved


def _forward_rows(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    rows: Rows,
    head: Head,
    entropy: bool,
    entropy_grad: bool,
    sum_sq: bool,
    mode: str,
    backend: str,
    chunk_tokens: int | None,
) -> tuple[list[Tensor | None], Tensor]:
    """`_forward` of the valid tokens: its first five results, each None if not requested, and `saved`.

    One product with the head for the statistics, and one more for each direction.
    """
    frozen = mode == FROZEN
    dtype = result_dtype(hidden.dtype, weight.dtype)
    sizes = choose(weight.shape[0], dtype, hidden.device, chunk_tokens=chunk_tokens)
    if sizes.implementation == TILED and mode == FORWARD and _tiled_kernel_runs(hidden, weight, backend):
        from .triton_tiled import tiled_statistics

        h = rows.take(hidden, slice(0, rows.count)).to(weight.dtype)
        statistics = tiled_statistics(h, weight, y, head, entropy=entropy, sum_sq=sum_sq)
        return [*statistics, None, None], hidden.new_empty(0, dtype=dtype)
    entropy_direction = frozen and entropy_grad
    tiles = HeadTiles(
        hidden, weight, head, rows.count, sizes, backend, exp_operand=frozen, entropy_term=entropy_direction
    )
    results = [
        *(hidden.new_empty(rows.count, dtype=dtype) if x else None for x in (True, entropy, sum_sq)),
        *(hidden.new_empty(rows.count, hidden.shape[-1]) if x else None for x in (frozen, entropy_direction)),
    ]
    saved = hidden.new_empty(SAVED, rows.count, dtype=dtype)
    outputs = TileOutputs(entropy_sum=entropy, sum_sq=sum_sq, exponentials=frozen)
    for piece in rows.chunks(tiles.rows):
        h = rows.take(hidden, piece).to(tiles.operand_dtype)
        stats, exp_times_head, term_times_head = tiles.sweep(h, y[piece], outputs, second_product=frozen)
        for into, value in zip(results[:3], (stats.logprobs, stats.entropy, stats.log_sum_sq_probs), strict=True):
            if into is not None and value is not None:
                into[piece] = value
        entropies = torch.zeros_like(stats.total) if stats.entropy is None else stats.entropy
        saved[:, piece] = torch.stack(
            [stats.shift, stats.total, stats.one_minus_p, stats.slope, stats.logprobs, entropies]
        )
        # The entropy's direction first: it overwrites only term_times_head. The log-prob's overwrites exp_times_head.
        for into, gradient_of in ((results[4], entropy_gradient), (results[3], logprob_gradient)):
            if into is not None and exp_times_head is not None:
                into[piece] = tiles.hidden_grad_(exp_times_head, term_times_head, gradient_of(stats), y[piece])
        del h, stats, exp_times_head, term_times_head, entropies  # or they would live through the next sweep
    return results, saved


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    entropy, entropy_grad, sum_sq, mode = rest[6:10]
    dtype, tokens = result_dtype(hidden.dtype, weight.dtype), targets.numel()
    directions = (mode == FROZEN, mode == FROZEN and entropy_grad)
    return (
        *(hidden.new_empty(tokens if wanted else 0, dtype=dtype) for wanted in (True, entropy, sum_sq)),
        *(hidden.new_empty((tokens, hidden.shape[-1]) if wanted else (0,)) for wanted in directions),
        hidden.new_empty((SAVED, tokens) if mode == TRAINED else (0,), dtype=dtype),
    )


def _tiled_kernel_runs(hidden: Tensor, weight: Tensor, backend: str) -> bool:
    dtype, device = result_dtype(hidden.dtype, weight.dtype), weight.device
    if backend == "torch" or dtype != torch.float32 or launch.unavailable_reason(device) is not None:
        return False
    if weight.dtype != matmul.operand_dtype(hidden.dtype, weight.dtype, dtype, device):  # the whole head would be cast
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)  # below, registers spill


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, mask, bias, forbidden, *ctx.numbers, _, ctx.entropy_grad, _, ctx.mode = inputs[:13]
    ctx.backend_and_chunk, ctx.shape, ctx.inputs = inputs[13:], hidden.shape, len(inputs)
    logprobs, entropies, log_sum_sq, direction, entropy_direction, saved = output
    constants = (log_sum_sq, direction, entropy_direction, saved, *(() if ctx.entropy_grad else (entropies,)))
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)
    if ctx.mode == TRAINED:
        ctx.save_for_backward(hidden, weight, targets, mask, bias, forbidden, saved)
    elif ctx.mode == FROZEN:
        # Not logprobs itself: the caller may change it in place.
        ctx.save_for_backward(mask, logprobs.isfinite(), direction, entropy_direction)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprobs, grad_entropy = grads[0], grads[1] if ctx.entropy_grad else None
    out: list[Tensor | None] = [None] * ctx.inputs
    if grad_logprobs is None and grad_entropy is None:
        return tuple(out)
    if ctx.mode == FROZEN:
        grad = torch.ops.onecard.scale_directions(*ctx.saved_tensors, grad_logprobs, grad_entropy)
        return grad.view(ctx.shape), *out[1:]
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 4)]  # hidden, weight, bias
    hidden, weight, bias = torch.ops.onecard.linear_logprobs_backward(
        *ctx.saved_tensors, grad_logprobs, grad_entropy, *ctx.numbers, *needed, *ctx.backend_and_chunk
    )
    hidden = hidden.view(ctx.shape) if needed[0] else hidden
    for index, grad, need in zip((0, 1, 4), (hidden, weight, bias), needed, strict=True):
        out[index] = grad if need else None
    return tuple(out)


_forward.register_autograd(no_double_backward(_backward), setup_context=_setup)


@torch.library.custom_op("onecard::scale_directions", mutates_args=())
def scale_directions(
    mask: Tensor | None,
    finite: Tensor,
    direction: Tensor,
    entropy_direction: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """dL/dh = dL/dlogp * dlogp/dh + dL/dH * dH/dh per token: the whole backward of a frozen head.

    `finite`: tokens whose log-prob is finite. Only these take `grad_logprobs`.
    """
    valid = torch.ones_like(finite) if mask is None else mask.reshape(-1).bool()
    terms = []
    for source, incoming, used in (
        (direction, grad_logprobs, valid & finite),
        (entropy_direction, grad_entropy, valid),
    ):
        if incoming is not None:  # it may be NaN where it is not used
            terms.append((source, torch.where(used, incoming.reshape(-1), 0.0).unsqueeze(1)))
    grad = torch.empty_like(direction)
    for rows in blocks(grad.shape[0], grad.shape[1], 4, grad.device):  # products in fp32, rounded once
        torch.mul(terms[0][0][rows], terms[0][1][rows], out=grad[rows])
        if len(terms) == 2:
            grad[rows] = sum(source[rows] * coefficient[rows] for source, coefficient in terms)
    return grad


@scale_directions.register_fake
def _(mask: Any, finite: Tensor, direction: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(direction)


@torch.library.custom_op("onecard::linear_logprobs_backward", mutates_args=())
def _recompute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias with a trained head. The logits are computed again, tile by tile."""
    checks.not_emptied(weight)
    with matmul.without_autocast(hidden):
        rows, head = Rows(targets.shape, mask), Head(bias, temperature, logit_scale, softcap, forbidden)
        grads = _recompute_rows(
            hidden,
            weight,
            rows.select_valid(targets).long(),
            rows,
            head,
            saved if rows.index is None else saved[:, rows.index],
            None if grad_logprobs is None else rows.select_valid(grad_logprobs),
            None if grad_entropy is None else rows.select_valid(grad_entropy),
            (need_hidden, need_weight, need_bias),
            backend,
            chunk_tokens,
        )
        return (
            hidden.new_empty(0) if grads.hidden is None else rows.scatter(grads.hidden),
            hidden.new_empty(0) if grads.weight is None else grads.weight.to(weight.dtype),
            hidden.new_empty(0) if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
        )


def _recompute_rows(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    rows: Rows,
    head: Head,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    needed: tuple[bool, bool, bool],
    backend: str,
    chunk_tokens: int | None,
) -> Gradients:
    """`_recompute` of the valid tokens."""
    with_entropy = grad_entropy is not None
    sizes = choose(weight.shape[0], saved.dtype, hidden.device, chunk_tokens=chunk_tokens)
    # exp_operand=False: dL/dz is formed in fp32 from the exponentials, and only then cast to the operands' dtype.
    tiles = HeadTiles(hidden, weight, head, rows.count, sizes, backend, exp_operand=False, entropy_term=with_entropy)
    grads = Gradients(hidden, weight, rows, needed, tiles.dtype, hidden.dtype)
    state = new_state(rows.count, saved)
    state[SHIFT] = saved[0]  # the forward's final shift: no tile changes it
    outputs = TileOutputs(entropy_sum=with_entropy, exponentials=True)
    for piece in rows.chunks(tiles.rows):
        h = rows.take(hidden, piece).to(tiles.operand_dtype)
        stats = Statistics._make((*saved[:, piece], None))
        logit_grad = _loss_gradient(stats, *(None if x is None else x[piece] for x in (grad_logprobs, grad_entropy)))
        for part, tile in tiles.tiles():
            z, e, term = tiles.buffers(h.shape[0], tile.shape[0])
            matmul.project(h, tile, z, tiles.scratch)
            piece_state = state[:, piece].contiguous()
            tiles.exp_tile(z, e, term, y[piece], part.start, piece_state, head.columns(part), outputs)
            grads.add(tiles, part, tile, derivative_(e, term, logit_grad, y[piece], part.start, head.factor), h)
        grads.write(piece)
        del h  # or it would live until the next piece's is allocated
    return grads


def _loss_gradient(stats: Statistics, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> LogitGrad:
    zero = torch.zeros_like(stats.total)
    logit_grad = LogitGrad(zero, None, zero)
    if grad_logprobs is not None:
        logit_grad = add_gradients(logit_grad, logprob_gradient(stats, grad_logprobs))
    if grad_entropy is not None:
        logit_grad = add_gradients(logit_grad, entropy_gradient(stats, grad_entropy))
    return logit_grad


@_recompute.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    need_hidden, need_weight, need_bias = rest[7:10]
    return (
        hidden.new_empty((targets.numel(), hidden.shape[-1]) if need_hidden else (0,)),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )


no_forward_ad("linear_logprobs", _forward, scale_directions, _recompute)


# ---------------------------------------------------------------------------------------------------------------------
# Peak bytes that the operators allocate inside (see `workspace`). `a` has an operator's arguments by name.


@workspace.formula("onecard::linear_logprobs")
def _forward_bytes(device: torch.device, a: SimpleNamespace) -> int:
    frozen, trained, masked = a.mode == FROZEN, a.mode == TRAINED, a.mask is not None
    num_directions = frozen + (frozen and a.entropy_grad)
    tiles = TileBytes.of(
        device,
        a.hidden,
        a.weight,
        a.targets.numel(),
        chunk_tokens=a.chunk_tokens,
        exp_operand=num_directions > 0,
        entropy_term=num_directions == 2,
    )
    # the terms of the entropy's sum take memory of their own, unless the buffer of the entropy term has their dtype
    own_term = a.entropy and not (num_directions == 2 and tiles.operand_itemsize == tiles.accumulator_itemsize)
    in_pass = tiles.exp_pass(a.backend, entropy_term=own_term, slope=num_directions > 0 and a.softcap is not None)
    directions = num_directions * tiles.hidden_rows * tiles.accumulator_itemsize  # of a chunk's tokens
    sweep = max(in_pass + directions * (tiles.count > 1), directions + tiles.target_rows * (num_directions > 0))
    saved = SAVED * tiles.tokens * tiles.accumulator_itemsize
    # `saved` is an output with a trained head; outputs are not counted
    throughout = id_bytes(a.targets, masked=masked) + saved * (not trained)
    in_loop = tiles.buffers + tiles.chunk_bytes(a.hidden, masked=masked, sweep=sweep + tiles.per_token(STATISTICS))
    results = (1 + a.entropy + a.sum_sq) * tiles.tokens * tiles.accumulator_itemsize
    results += num_directions * a.hidden.numel() * a.hidden.dtype.itemsize
    scattered = results + saved * trained if masked else 0
    return throughout + max(in_loop, scattered)


@workspace.formula("onecard::linear_logprobs_backward")
def _recompute_bytes(device: torch.device, a: SimpleNamespace) -> int:
    count, masked, with_entropy = a.targets.numel(), a.mask is not None, a.grad_entropy is not None
    tiles = TileBytes.of(
        device, a.hidden, a.weight, count, chunk_tokens=a.chunk_tokens, exp_operand=False, entropy_term=with_entropy
    )
    num_grads = (a.grad_logprobs is not None) + with_entropy
    of_valid_tokens = (
        (SAVED + num_grads) * count * tiles.accumulator_itemsize if masked else 0
    )  # copies of `saved` and gradients
    state = SLOTS * (count + tiles.chunk) * tiles.accumulator_itemsize
    grad_rows = (
        tiles.hidden_rows * tiles.accumulator_itemsize * a.need_hidden
    )  # the hidden gradient of a chunk's tokens
    cast_tile = tiles.logits * tiles.operand_itemsize * (tiles.operand_itemsize != tiles.accumulator_itemsize)
    itemsize = a.hidden.dtype.itemsize
    cast_grad_rows = tiles.hidden_rows * itemsize * (a.need_hidden and itemsize != tiles.accumulator_itemsize)
    in_pass = tiles.exp_pass(a.backend, entropy_term=False, slope=a.softcap is not None)
    step = max(in_pass + grad_rows * (tiles.count > 1), grad_rows + cast_tile, grad_rows + cast_grad_rows)
    step += tiles.per_token(10)  # the statistics, and the coefficients of the logits' gradient
    in_loop = tiles.buffers + state + tiles.chunk_bytes(a.hidden, masked=masked, sweep=step)
    grad_hidden = a.hidden.numel() * itemsize * a.need_hidden
    grad_weight = a.weight.numel() * tiles.accumulator_itemsize * a.need_weight
    cast_grad_weight = a.weight.numel() * a.weight.dtype.itemsize * a.need_weight
    gradients = grad_hidden + grad_weight
    at_end = gradients + (grad_hidden if masked else 0)  # for the scattered copy
    at_end += cast_grad_weight if a.weight.dtype.itemsize != tiles.accumulator_itemsize else 0
    return (
        id_bytes(a.targets, masked=masked)
        + of_valid_tokens
        + max(gradients + in_loop, at_end)
        - (grad_hidden + cast_grad_weight)
    )


@workspace.formula("onecard::scale_directions")
def _scale_directions_bytes(device: torch.device, a: SimpleNamespace) -> int:
    count, width = a.direction.shape
    block = block_bytes(device, count, width, 4)
    num_grads = (a.grad_logprobs is not None) + (a.grad_entropy is not None)
    factors = count * (2 + 5 * num_grads)  # two bool masks; for each gradient an fp32 factor and a bool
    if num_grads == 2:
        return factors + 3 * block
    # On a CPU, factors of two dtypes are cast to the wider one, and the product is cast back.
    return factors + (2 * block if device.type == "cpu" and a.direction.dtype.itemsize < 4 else 0)
