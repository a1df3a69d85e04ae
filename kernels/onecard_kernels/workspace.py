"""What the registered operators hold inside, beyond their inputs and outputs, while they run: for memory plans.

A tracker of tensors sees what an operator takes and gives, never what it allocates and frees in between. So each one
that needs more than a few numbers per token says here how much, as arithmetic on shapes, dtypes and the plan that
`logprob.plans` makes for the device that is asked about; the tensors may be on `meta`, and nothing runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .logprob import passes
from .logprob.linear import SAVED
from .logprob.plans import CHUNKED, choose
from .logprob.products import SCRATCH_ROWS, operand_dtype
from .logprob.state import SLOTS
from .ppo.local import kept_dtype
from .workspace_tiles import (
    IDS,
    accumulated_dtype,
    block_bytes,
    by_triton,
    ids,
    is_flat,
    pass_bytes,
    taken,
    target_rows,
    tiles_of,
)

FROZEN, TRAINED = "frozen", "trained"  # of linear_logprobs


def workspace_bytes(operator: str, device: torch.device, *arguments: Any, **more: Any) -> int:
    """Bytes that `operator` ("onecard::linear_logprobs", ...) holds at most beyond inputs and outputs on `device`.

    `arguments` are the operator's own. An operator that holds no more than a few numbers per token gives 0.
    """
    found = TABLE.get(operator)
    return 0 if found is None else found(device, *arguments, **more)


STATISTICS = SLOTS + 14  # numbers per token while a step's statistics are put together


def linear_logprobs(
    device: torch.device, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, *rest: Any
) -> int:
    _, _, _, _, softcap, entropy, entropy_grad, sum_sq, mode, backend = rest
    count, width = targets.numel(), hidden.shape[-1]
    dtype, gathered = accumulated_dtype(hidden, weight), mask is not None or not is_flat(hidden)
    sums = (mode == FROZEN) + (mode == FROZEN and entropy_grad)
    tiles = tiles_of(
        device, hidden, weight, count, choose(weight.shape[0], dtype, device), direction=sums > 0, spread=sums == 2
    )
    triton = by_triton(device, backend, dtype)
    held = entropy and not (sums == 2 and tiles.operand == tiles.accumulated)
    in_pass = pass_bytes(tiles, triton=triton, held=held, slope=sums > 0 and softcap is not None)
    totals = sums * tiles.step * width * tiles.accumulated
    sweep = max(in_pass + totals * (tiles.count > 1), totals + target_rows(weight, tiles) * (sums > 0))
    saved = SAVED * count * tiles.accumulated
    kept = ids(targets, gathered=mask is not None) + saved * (mode != TRAINED)
    during = tiles.buffers + taken(hidden, tiles, gathered=gathered, sweep=sweep + tiles.per_token(STATISTICS))
    numbers = (1 + entropy + sum_sq) * count * tiles.accumulated + sums * count * width * hidden.dtype.itemsize
    spread = numbers + saved * (mode == TRAINED) if mask is not None else 0
    return kept + max(during, spread)


def linear_logprobs_backward(
    device: torch.device, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, *rest: Any
) -> int:
    _, _, _, on_logprobs, on_entropy, _, _, softcap, need_hidden, need_weight, _, backend = rest
    count, width = targets.numel(), hidden.shape[-1]
    dtype, gathered = accumulated_dtype(hidden, weight), mask is not None or not is_flat(hidden)
    plan = choose(weight.shape[0], dtype, device)
    tiles = tiles_of(device, hidden, weight, count, plan, direction=False, spread=on_entropy is not None)
    triton = by_triton(device, backend, dtype)
    given = (on_logprobs is not None) + (on_entropy is not None)
    picked = (SAVED + given) * count * tiles.accumulated if mask is not None else 0
    state = SLOTS * (count + tiles.step) * tiles.accumulated
    of_piece = tiles.step * width * tiles.accumulated * need_hidden
    rounded = tiles.operand != tiles.accumulated
    narrow = tiles.step * tiles.columns * tiles.operand * rounded
    written = tiles.step * width * hidden.dtype.itemsize * (need_hidden and hidden.dtype.itemsize != tiles.accumulated)
    in_pass = pass_bytes(tiles, triton=triton, held=False, slope=softcap is not None)
    step = max(in_pass + of_piece * (tiles.count > 1), of_piece + narrow, of_piece + written)
    during = tiles.buffers + state + taken(hidden, tiles, gathered=gathered, sweep=step + tiles.per_token(10))
    by_hidden = count * width * hidden.dtype.itemsize * need_hidden
    by_weight = weight.numel() * tiles.accumulated * need_weight
    outputs = by_hidden + weight.numel() * weight.dtype.itemsize * need_weight
    inside = by_hidden + by_weight
    at_end = inside + (by_hidden if mask is not None else 0)
    at_end += outputs - by_hidden if weight.dtype.itemsize != tiles.accumulated else 0
    return ids(targets, gathered=mask is not None) + picked + max(inside + during, at_end) - outputs


def scale_directions(device: torch.device, mask: Tensor | None, possible: Tensor, direction: Tensor, *rest: Any) -> int:
    _, on_logprobs, on_entropy = rest
    count, width = direction.shape
    block = block_bytes(device, count, width, 4)
    given = (on_logprobs is not None) + (on_entropy is not None)
    numbers = count * (2 + 5 * given)
    if given == 2:
        return numbers + 3 * block
    # A CPU multiplies numbers of one dtype: both factors and the product are cast.
    return numbers + (2 * block if device.type == "cpu" and direction.dtype.itemsize < 4 else 0)


def linear_ppo(device: torch.device, hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> int:
    _, _, _, ref_logprobs, weights, _, _, _, _, softcap, *_ = rest
    entropy_coef, needs, backend = rest[-5], rest[-2], rest[-1]
    count, width = targets.numel(), hidden.shape[-1]
    dtype, (by_hidden, by_weight, by_bias) = accumulated_dtype(hidden, weight), needs
    trained, learns = by_weight or by_bias, any(needs)
    only = CHUNKED if trained else None
    plan = choose(weight.shape[0], dtype, device, only=only)
    direction, spread = learns and not trained, learns and entropy_coef != 0.0
    tiles = tiles_of(device, hidden, weight, count, plan, direction=direction, spread=spread)
    triton = by_triton(device, backend, dtype)
    spread_is_wide = spread and (trained or tiles.operand == tiles.accumulated)
    in_pass = pass_bytes(tiles, triton=triton, held=not spread_is_wide, slope=learns and softcap is not None)
    whole = tiles.count == 1
    sums = tiles.step * width * tiles.accumulated
    kept = kept_dtype(hidden.dtype)
    written = tiles.step * width * kept.itemsize * (kept.itemsize != tiles.accumulated)
    if not learns:
        sweep = in_pass
    elif trained:
        narrow = tiles.step * tiles.columns * tiles.operand * (tiles.operand != tiles.accumulated)
        sweep = max(in_pass, sums * by_hidden + max(narrow, written * by_hidden))
    elif whole:
        size = tiles.step * tiles.columns * tiles.operand * spread
        first = block_bytes(device, tiles.step, tiles.columns, tiles.operand) * spread
        last = size - first * (math.ceil(size / first) - 1) if size else 0  # lives on through the product
        sweep = max(in_pass, first + min(first, size - first), last + sums + max(target_rows(weight, tiles), written))
    else:
        sums *= 1 + spread  # those of the step before live on until the new ones are there
        sweep = sums * (1 + (count > tiles.step)) + max(in_pass, target_rows(weight, tiles), written)
    inside = count * width * kept.itemsize * by_hidden
    per_token = (2 + (ref_logprobs is not None) + (weights is not None)) * 4 + 1 + 2 * IDS + 1
    sweep += tiles.per_token(STATISTICS + 8)
    during = tiles.buffers + taken(hidden, tiles, gathered=True, sweep=sweep)
    return count * per_token + max(during, inside)


def scale_linear_ppo(device: torch.device, *arguments: Any) -> int:
    """A CPU forms a product in the wider dtype before it is rounded."""
    if device.type != "cpu":
        return 0
    given, dtypes = arguments[:3], arguments[4:]
    sizes = [x.numel() * dtype.itemsize for x, dtype in zip(given, dtypes, strict=True)]
    wide = [x.numel() * x.dtype.itemsize * (x.dtype != dtype) for x, dtype in zip(given, dtypes, strict=True)]
    return max(sum(sizes[: place + 1]) + wide[place] for place in range(len(sizes))) - sum(sizes)


def linear_kl(device: torch.device, hidden: Tensor, ref_hidden: Tensor, weight: Tensor, *rest: Any) -> int:
    ref_weight, mask, _, _, _, _, _, softcap, direction, backend = rest
    dtype, width = accumulated_dtype(hidden, weight), hidden.shape[-1]
    count, vocabulary = hidden.shape[:-1].numel(), weight.shape[0]
    plan = choose(vocabulary, dtype, device, only=CHUNKED)
    step = max(1, min(plan.rows // 2, count))
    operand = operand_dtype(hidden.dtype, weight.dtype, dtype, device)
    shared = ref_weight is None and ref_hidden.dtype == hidden.dtype
    scratch = min(SCRATCH_ROWS, vocabulary) * width * operand.itemsize if weight.dtype != operand else 0
    other = weight if ref_weight is None else ref_weight
    ref_operand = operand_dtype(ref_hidden.dtype, other.dtype, dtype, device)
    ref_scratch = 0
    if not shared and other.dtype != ref_operand:
        ref_scratch = min(SCRATCH_ROWS, vocabulary) * other.shape[1] * ref_operand.itemsize
    piece = math.ceil(count / math.ceil(count / step)) if count else 0
    gathered = mask is not None
    rows = piece * width * operand.itemsize * (gathered or hidden.dtype != operand)
    ref_rows = piece * ref_hidden.shape[-1] * ref_operand.itemsize * (gathered or ref_hidden.dtype != ref_operand)
    both = piece * 2 * width * operand.itemsize * shared
    narrow = piece * vocabulary * operand.itemsize * (direction and operand != dtype)
    block = block_bytes(device, piece, vocabulary, dtype.itemsize)
    bools = block // dtype.itemsize
    in_pass = block * (KL_BLOCKS + (direction and softcap is not None)) + bools
    if by_triton(device, backend, dtype):
        in_pass = 0
    product = piece * width * (dtype.itemsize + hidden.dtype.itemsize * (hidden.dtype != dtype)) * direction
    inside = count * dtype.itemsize + count * width * hidden.dtype.itemsize * direction
    kept = (count * IDS if gathered else 0) + 2 * step * vocabulary * dtype.itemsize + scratch + ref_scratch
    during = kept + rows + ref_rows + max(both, narrow + max(in_pass, product))
    return max(during, inside if gathered else 0)


KL_BLOCKS = 5  # of the pass in torch: p, q, and what the sum's terms are made of


def selective_forward(
    device: torch.device,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    entropy: bool,
    backend: str,
) -> int:
    dtype, count = passes.result_dtype(logits.dtype), targets.numel()
    stats = 5 * count * dtype.itemsize
    if by_triton(device, backend, dtype):
        return 0
    return stats + selective_block(logits, mask, dtype, 1 + entropy) + ids(targets, gathered=mask is not None)


def selective_backward(
    device: torch.device, logits: Tensor, targets: Tensor, mask: Tensor | None, stats: Tensor, *rest: Any
) -> int:
    _, on_entropy, _, backend = rest
    dtype, count = passes.result_dtype(logits.dtype), targets.numel()
    if by_triton(device, backend, dtype):
        return 0
    columns = (10 + 8 * (on_entropy is not None)) * count * dtype.itemsize
    return columns + selective_block(logits, mask, dtype, 1 + (on_entropy is not None))


def selective_block(logits: Tensor, mask: Tensor | None, dtype: torch.dtype, blocks: int) -> int:
    """A block of logits in the accumulation dtype, so many times, and the gather that it is made of."""
    width = logits.shape[-1]
    count = logits.shape[:-1].numel()
    rows = min(count, max(1, passes.BLOCK_BYTES // (width * dtype.itemsize)))
    rows = math.ceil(count / math.ceil(count / rows)) if count else 0
    gathered = rows * width * logits.dtype.itemsize if mask is not None else 0
    return rows * width * dtype.itemsize * (blocks + (count > rows)) + gathered  # the one before lives on for a while


TABLE: dict[str, Callable[..., int]] = {
    "onecard::linear_logprobs": linear_logprobs,
    "onecard::linear_logprobs_backward": linear_logprobs_backward,
    "onecard::scale_directions": scale_directions,
    "onecard::linear_ppo": linear_ppo,
    "onecard::scale_linear_ppo": scale_linear_ppo,
    "onecard::linear_kl": linear_kl,
    "onecard::selective_forward": selective_forward,
    "onecard::selective_backward": selective_backward,
}
