"""Forward-only linear_logprobs in Triton: logits stay on chip, one tile at a time.

A program takes a block of rows and a split of the vocabulary. For each tile of it: product, head, online softmax. It
writes its results to `partials`. A second kernel combines the splits of each row in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import interpreted
from ..records import Head
from .triton_math import log, log1p, tanh
from .tuning import TileConfig, config_for, config_on, tiles_per_program

__all__ = ["TileConfig", "config_for", "tiled_statistics"]

# A finite -inf: MINUS_INF - MINUS_INF and 0 * MINUS_INF are 0, where infinities give NaN. A split whose logits are all
# MINUS_INF has a meaningless sum. exp(MINUS_INF - any other logit) = 0 removes it from the row's sum.
MINUS_INF = tl.constexpr(-1e30)
LEAST_LOGIT = tl.constexpr(-1e29)  # anything below is MINUS_INF
COMBINED_ROWS = 32  # of a program of the second kernel


def tiled_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: Head,
    *,
    entropy: bool,
    sum_sq: bool,
    config: TileConfig | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-token log-prob, entropy and log-sum of squared probabilities, without logits in memory; no gradient.

    z = Head(hidden @ weight.T);  logp = z_y - logsumexp z;  H = -sum_v p_v log p_v;  log sum_v p_v^2

    The online softmax is that of "Online normalizer calculation for softmax", Milakov and Gimelshein, 2018,
    https://arxiv.org/abs/1805.02867, with the target's column left out and added at the end: 1 - p_y is then a sum and
    not 1 minus p_y.

    Args:
        hidden: `[n, D]`, bf16, fp16 or fp32, any strides.
        weight: `[V, D]`, hidden's dtype, any strides.
        targets: integer `[n]`, ids from 0 to V - 1; an id outside gives NaN.
        head: the transform between the product and the softmax.
        entropy, sum_sq: whether to compute the second and the third result.
        config, splits: the tile and the number of splits of the vocabulary; None: from `tuning`.

    Returns:
        fp32 `[n]` each in nats; the last two None if not requested. A forbidden target gives -inf.

    Raises:
        TypeError: for fp64 or for unequal dtypes. ValueError: for a card below compute capability 8.0.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"hidden has dtype {hidden.dtype}, expected bfloat16, float16 or float32: the tile's accumulator is fp32, "
            "so float64 would gain no precision; use the torch backend"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {hidden.dtype} like hidden")
    (n, d), v = hidden.shape, weight.shape[0]
    config = config or config_on(hidden.device, hidden.dtype, head, entropy + sum_sq)
    row_blocks, tiles = triton.cdiv(n, config.rows), triton.cdiv(v, config.columns)
    per_split = triton.cdiv(tiles, splits) if splits else tiles_per_program(row_blocks, tiles, config)
    splits = triton.cdiv(tiles, per_split)

    logprobs = hidden.new_empty(n, dtype=torch.float32)
    entropies, log_sum_sq = (torch.empty_like(logprobs) if wanted else None for wanted in (entropy, sum_sq))
    if n == 0:
        return logprobs, entropies, log_sum_sq
    targets = targets.contiguous()
    partials = hidden.new_empty(2 + entropy + sum_sq, splits, n, dtype=torch.float32)
    target_logits = hidden.new_empty(n, dtype=torch.float32)
    inner, outer = scales(head)
    with torch.cuda.device_of(hidden):
        _tiles_kernel[(row_blocks * splits,)](
            hidden,
            weight,
            targets,
            targets if head.bias is None else head.bias.contiguous(),
            targets if head.forbidden is None else head.forbidden.contiguous().view(torch.uint8),
            partials,
            target_logits,
            inner,
            outer,
            n,
            v,
            splits,
            per_split,
            num_warps=config.warps,
            num_stages=config.stages,
            D=d,
            H_ROW=hidden.stride(0),
            H_COL=hidden.stride(1),
            W_ROW=weight.stride(0),
            W_COL=weight.stride(1),
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            GROUP=config.group,
            ENTROPY=entropy,
            SUM_SQ=sum_sq,
            UPCAST=interpreted(),
            **flags(head),
        )
    padded_splits, rows = triton.next_power_of_2(splits), COMBINED_ROWS
    with torch.cuda.device_of(partials):
        _combine_kernel[(triton.cdiv(n, rows),)](
            partials,
            target_logits,
            targets,
            logprobs,
            logprobs if entropies is None else entropies,
            logprobs if log_sum_sq is None else log_sum_sq,
            n,
            v,
            splits,
            num_warps=max(1, min(8, padded_splits * rows // 512)),
            num_stages=2,
            ROWS=rows,
            SPLITS=padded_splits,
            ENTROPY=entropy,
            SUM_SQ=sum_sq,
        )
    return logprobs, entropies, log_sum_sq


def scales(head: Head) -> tuple[float, float]:
    """z = (acc + bias) * inner without a softcap, tanh((acc + bias) * inner) * outer with one."""
    if head.softcap is None:
        return head.factor, 1.0
    return head.logit_scale / head.softcap, head.softcap / head.temperature


def flags(head: Head) -> dict[str, bool]:
    """Which steps of the head there are, as compile-time arguments of `transform`."""
    return {
        "BIAS": head.bias is not None,
        "SCALED": head.softcap is not None or head.factor != 1.0,
        "SOFTCAP": head.softcap is not None,
        "FORBIDDEN": head.forbidden is not None,
    }


@triton.jit
def allowed_columns(forbidden, cols, vocabulary, FORBIDDEN: tl.constexpr):
    """Mask of the columns that are in the softmax: inside the vocabulary and not forbidden."""
    allowed = cols < vocabulary
    if FORBIDDEN:
        allowed = allowed & (tl.load(forbidden + cols, mask=allowed, other=1) == 0)
    return allowed


@triton.jit
def transform(z, bias, allowed, inner, outer, BIAS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Head.transform on chip. `bias` is not read without BIAS."""
    if BIAS:
        z = z + bias
    if SCALED:
        z = z * inner
    if SOFTCAP:
        z = tanh(z) * outer
    return tl.where(allowed, z, MINUS_INF)


@triton.jit
def index(at, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """at * STRIDE for at < SIZE, in 32 bits if they are enough."""
    if SIZE * STRIDE >= 1 << 30:
        at = at.to(tl.int64)
    return at * STRIDE


@triton.jit(do_not_specialize=["n", "splits", "per_split"])
def _tiles_kernel(
    hidden,
    weight,
    targets,
    bias,
    forbidden,
    partials,
    target_logits,
    inner,
    outer,
    n,
    vocabulary,
    splits,
    per_split,
    D: tl.constexpr,
    H_ROW: tl.constexpr,
    H_COL: tl.constexpr,
    W_ROW: tl.constexpr,
    W_COL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    UPCAST: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORBIDDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    first = pid // (GROUP * splits) * GROUP
    here = tl.minimum(tl.cdiv(n, ROWS) - first, GROUP)
    local = pid % (GROUP * splits)
    row = (first + local % here) * ROWS
    split = local // here

    # Rows and columns past the end read the last one instead, so loads have no mask. `allowed_columns` removes padding
    # columns from the softmax, and padding rows are never stored. Offsets of tiles have 64 bits, inside a tile 32 if
    # strides allow.
    k = tl.arange(0, DEPTH)
    rows = tl.arange(0, ROWS)
    inside = rows < n - row
    h_rows = tl.minimum(rows, n - 1 - row)
    h_tile = index(h_rows, ROWS, H_ROW)[:, None] + index(k, DEPTH, H_COL)[None, :]
    hidden += row.to(tl.int64) * H_ROW
    targets += row
    target_logits += row

    top = tl.full((ROWS,), MINUS_INF, tl.float32)
    off = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    begin = split * per_split
    for tile in range(begin, tl.minimum(begin + per_split, tl.cdiv(vocabulary, COLUMNS))):
        column = tile * COLUMNS
        cols = tl.arange(0, COLUMNS)
        w_rows = tl.minimum(cols, vocabulary - 1 - column)
        w_tile = index(w_rows, COLUMNS, W_ROW)[None, :] + index(k, DEPTH, W_COL)[:, None]
        h = hidden
        w = weight + tl.cast(column, tl.int64) * W_ROW
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, D, DEPTH):
            if D % DEPTH == 0:
                a = tl.load(h + h_tile)
                b = tl.load(w + w_tile)
            else:
                a = tl.load(h + h_tile, mask=(start + k)[None, :] < D, other=0.0)
                b = tl.load(w + w_tile, mask=(start + k)[:, None] < D, other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")
            h += DEPTH * H_COL
            w += DEPTH * W_COL

        # Loaded again in each tile: the product needs the registers that they would occupy.
        cols = column + tl.arange(0, COLUMNS)
        y = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
        allowed = allowed_columns(forbidden, cols, vocabulary, FORBIDDEN)
        shift = 0.0
        if BIAS:
            shift = tl.load(bias + cols, mask=cols < vocabulary, other=0.0).to(tl.float32)[None, :]
        z = transform(z, shift, allowed[None, :], inner, outer, BIAS, SCALED, SOFTCAP)
        target = cols[None, :] == y[:, None]
        z_y = tl.sum(tl.where(target, z, 0.0), 1)
        tl.store(target_logits + rows, z_y, mask=inside & (y >= column) & (y < column + COLUMNS))

        z = tl.where(target, MINUS_INF, z)
        higher = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp(top - higher)
        z -= higher[:, None]
        e = tl.exp(z)
        if ENTROPY:
            moment = shrink * (moment + off * (top - higher)) + tl.sum(e * z, 1)
        if SUM_SQ:
            square = shrink * shrink * square + tl.sum(e * e, 1)
        off = shrink * off + tl.sum(e, 1)
        top = higher

    quantity = tl.cast(splits, tl.int64) * n
    out = partials + tl.cast(split, tl.int64) * n + row
    tl.store(out + rows, top, mask=inside)
    tl.store(out + quantity + rows, off, mask=inside)
    if ENTROPY:
        tl.store(out + 2 * quantity + rows, moment, mask=inside)
    if SUM_SQ:
        tl.store(out + (2 + ENTROPY) * quantity + rows, square, mask=inside)


@triton.jit(do_not_specialize=["n", "splits"])
def _combine_kernel(
    partials,
    target_logits,
    targets,
    logprobs,
    entropy,
    log_sum_sq,
    n,
    vocabulary,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS).to(tl.int64)
    at = partials + split[:, None] * n + rows[None, :]
    inside = (split < splits)[:, None] & (rows < n)[None, :]
    quantity = tl.cast(splits, tl.int64) * n

    y = tl.load(targets + rows, mask=rows < n, other=0)
    valid = (rows < n) & (y >= 0) & (y < vocabulary)
    z_y = tl.load(target_logits + rows, mask=valid, other=float("nan"))
    tops = tl.load(at, mask=inside, other=MINUS_INF)
    offs = tl.load(at + quantity, mask=inside, other=0.0)

    top = tl.maximum(tl.max(tops, 0), z_y)
    below = tops - top[None, :]
    weights = tl.exp(below)
    off = tl.sum(weights * offs, 0)
    e_y = tl.exp(z_y - top)
    total = off + e_y
    # If the target is the largest logit its e is 1, and `off` may be too small to be added to 1.
    log_total = tl.where(z_y == top, log1p(off), log(total))
    logp = (z_y - top) - log_total
    tl.store(logprobs + rows, tl.where(z_y < LEAST_LOGIT, float("-inf"), logp), mask=rows < n)
    if ENTROPY:
        moments = tl.load(at + 2 * quantity, mask=inside, other=0.0)
        moment = tl.sum(weights * (moments + offs * below), 0) + e_y * (z_y - top)
        tl.store(entropy + rows, log_total - moment / total, mask=rows < n)
    if SUM_SQ:
        squares = tl.load(at + (2 + ENTROPY) * quantity, mask=inside, other=0.0)
        square = tl.sum(weights * weights * squares, 0) + e_y * e_y
        tl.store(log_sum_sq + rows, tl.log(square) - 2.0 * log_total, mask=rows < n)
