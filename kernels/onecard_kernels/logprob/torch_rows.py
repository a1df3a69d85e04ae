"""The torch path of selective_log_softmax: a forward and a backward over blocks of rows.

Only the logits themselves and five numbers of each row are saved. The backward computes each row's exponentials
again: that costs one pass, and saving the [tokens, V] softmax would cost as much memory as the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import result_dtype
from .rows import BLOCK_BYTES, Rows

FAR = -2000.0  # e^-2000 is 0 in fp64 too; a finite exponent, for 0 * -inf is NaN
STATS = 5  # per row: shift, sum of e^(z - shift), the same without the target's, logp, entropy


def forward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of targets' shape (no entropies: empty), and the statistics for `backward`.

    No small number is the difference of large ones: see `online_softmax`.
    """
    rows, dtype = Rows(targets.shape, mask), result_dtype(logits.dtype)
    y = rows.select_valid(targets).long()
    stats = logits.new_zeros(STATS, rows.count, dtype=dtype)
    for piece in rows.chunks(_block_rows(logits, dtype)):
        z = _scaled(rows, logits, piece, temperature, dtype)
        column = y[piece].unsqueeze(1)
        at_target = z.gather(1, column)
        z.scatter_(1, column, float("-inf"))
        shift = torch.maximum(z.amax(1, keepdim=True), at_target)
        z.sub_(shift)
        d = z.clamp(min=FAR) if entropy else None
        off = z.exp_().sum(1)
        at_target = (at_target - shift).squeeze(1)
        e_target = at_target.exp()
        total = off + e_target
        log_sum = total.log()
        logp = torch.where(e_target > off, -(off / e_target).log1p(), at_target - log_sum)
        stats[:4, piece] = torch.stack([shift.squeeze(1), total, off, logp])
        if d is not None:
            # Both terms are of the size of 1 - p_y near p_y = 1, as the entropy is.
            target_term = torch.where(e_target > 0, -e_target * logp, 0.0)
            stats[4, piece] = (target_term + off * log_sum - d.mul_(z).sum(1)) / total
    stats = rows.scatter(stats.T).T.contiguous()
    # Copies, not views of `stats`: autograd refuses `x.mul_()` on a view that a Function returns.
    logprobs = stats.new_empty(targets.shape)
    logprobs.view(-1).copy_(stats[3])
    entropies = stats.new_empty(targets.shape if entropy else (0,))
    if entropy:
        entropies.view(-1).copy_(stats[4])
    return logprobs, entropies, stats


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, into `out` (which may be the logits) or into new contiguous memory.

    d = (grad_logprobs (onehot - p) - grad_entropy p (log p + H)) / temperature;  p = e / total;
    log p = z - shift - log total
    """
    rows, dtype = Rows(targets.shape, mask), result_dtype(logits.dtype)
    y = rows.select_valid(targets).long()
    into = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    shift, total, off, logp, entropy = (rows.select_valid(row).unsqueeze(1) for row in stats)
    exp_coef, at_target = torch.zeros_like(total), torch.zeros_like(total)
    term_coef = None
    if grad_logprobs is not None:
        # a target whose logit is -inf has no gradient
        grad_logp = rows.select_valid(grad_logprobs).unsqueeze(1).masked_fill(logp == float("-inf"), 0.0) / temperature
        exp_coef, at_target = -grad_logp / total, grad_logp * (off / total)
    if grad_entropy is not None:
        grad_h = rows.select_valid(grad_entropy).unsqueeze(1) / temperature
        exp_coef, term_coef = exp_coef + grad_h * (total.log() - entropy) / total, -grad_h / total
        at_target = at_target - grad_h * torch.where(logp > float("-inf"), logp.exp() * (logp + entropy), 0.0)
    for piece in rows.chunks(_block_rows(logits, dtype)):
        z = _scaled(rows, logits, piece, temperature, dtype).sub_(shift[piece])
        if term_coef is None:
            z.exp_().mul_(exp_coef[piece])
        else:
            d = z.clamp(min=FAR)
            z.exp_().mul_(d.mul_(term_coef[piece]).add_(exp_coef[piece]))
        rows.put(into, piece, z.scatter_(1, y[piece].unsqueeze(1), at_target[piece]))
    if rows.index is not None:
        masked_out = torch.ones(rows.total, dtype=torch.bool, device=logits.device)
        masked_out[rows.index] = False
        into.masked_fill_(masked_out.view(*rows.shape, 1), 0.0)
    return into


def _block_rows(logits: Tensor, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (logits.shape[-1] * dtype.itemsize))


def _scaled(rows: Rows, logits: Tensor, piece: slice, temperature: float, dtype: torch.dtype) -> Tensor:
    """A new contiguous block of logits / temperature."""
    taken = rows.take(logits, piece)
    z = torch.empty_like(taken, dtype=dtype, memory_format=torch.contiguous_format).copy_(taken)
    return z if temperature == 1.0 else z.div_(temperature)
