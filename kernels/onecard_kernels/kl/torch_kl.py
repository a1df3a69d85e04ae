"""KL of rows of logits in torch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..logprob.rows import blocks
from ..records import Head

# For d = log p - log q above this, p (exp(-d) - 1 + d) is computed by expm1. Below, exp(-d) could overflow, and
# q - p + p d loses nothing by cancellation.
NEAR = -1.0


def kl_pass_(z: Tensor, r: Tensor, head: Head, *, ref_bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """KL(pi || ref) of each row, and where `out` is given dKL/dz there. z and r are overwritten.

    p = softmax(Head(z));  q = softmax(Head(r));  d_v = log p_v - log q_v
    KL = sum_v p_v (exp(-d_v) - 1 + d_v);  dKL/dz_v = p_v (d_v - KL) dHead/dz_v

    The sum is that of the definition, sum_v p_v d_v, plus 0 = sum_v q_v - p_v. No term is negative, so nothing cancels
    when the policy is near the reference.
    """
    ref_head = replace(head, bias=ref_bias)
    kl = z.new_empty(z.shape[0])
    for rows in blocks(z.shape[0], z.shape[1], z.element_size(), z.device):
        kl[rows] = _block(z[rows], r[rows], head, ref_head, None if out is None else out[rows])
    return kl


def _block(z: Tensor, r: Tensor, head: Head, ref_head: Head, out: Tensor | None) -> Tensor:
    slope = torch.empty_like(z) if out is not None and head.softcap is not None else None
    head.transform_(z, slope)
    ref_head.transform_(r)
    torch.log_softmax(z, 1, out=z)
    torch.log_softmax(r, 1, out=r)
    p, q, d = z.exp(), r.exp(), z.sub_(r)
    if head.forbidden is not None:
        d = d.masked_fill_(head.forbidden, 0.0)  # -inf - -inf, where p = q = 0
    far = (q - p).addcmul_(p, d)
    near = torch.expm1(-d.clamp(min=NEAR)).add_(d).mul_(p)
    kl = torch.where(d > NEAR, near, far).sum(1)
    if out is not None:
        gradient = d.sub_(kl.unsqueeze(1)).mul_(p)
        if slope is not None:
            gradient *= slope
        if not kl.is_cpu or bool(kl.isinf().any()):
            gradient.masked_fill_(kl.isinf().unsqueeze(1), 0.0)
        # The last step, because `out` may be z.
        torch.mul(gradient, head.factor, out=out)
    return kl
