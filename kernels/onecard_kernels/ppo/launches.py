"""The launches of PPO's kernels, on tensors of any shape and without autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..launch import launch
from .options import PolicyOptions, PolicyTokens, dtype_of
from .terms import SUMS
from .triton import finish_kernel, policy_kernel, scale_kernel, value_kernel

BLOCK = 1024  # tokens of one program
PER_THREAD = 4  # tokens, one load of 16 bytes in fp32
COLUMNS = 1024  # programs whose sums are added at once
POLICY_SUMS = len(SUMS)
VALUE_SUMS = 3  # loss, clipfrac, valid tokens


class Terms(NamedTuple):
    """After the launch over the tokens: `[sums, programs]`, and derivatives of the summed loss, empty if not asked."""

    sums: Tensor
    slope: Tensor
    entropy_slope: Tensor


class Finished(NamedTuple):
    """0-d loss, all sums (the loss and the count too) over the divisor, and the 0-d divisor."""

    loss: Tensor
    totals: Tensor
    divisor: Tensor


def _blocks(n: int) -> tuple[int, int]:
    """Programs, one at least so that there always is a sum, and tokens of each."""
    block = min(BLOCK, max(32, triton.next_power_of_2(n)))
    return max(1, triton.cdiv(n, block)), block


def _warps(block: int) -> int:
    return max(1, block // (32 * PER_THREAD))


def as_loadable(mask: Tensor) -> Tensor:
    """Bools as bytes, without a copy."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def policy_numbers(options: PolicyOptions) -> tuple[float, ...]:
    """In the order in which every policy kernel takes them."""
    dual_clip = 0.0 if options.dual_clip is None else options.dual_clip
    return options.clip_low, options.clip_high, dual_clip, options.entropy_coef, options.kl_coef


def policy_choices(tokens: PolicyTokens, options: PolicyOptions) -> dict[str, Any]:
    """The constants of compilation that every policy kernel has."""
    return {
        "HAS_DUAL": options.dual_clip is not None,
        "HAS_REF": tokens.ref_logprobs is not None,
        "KL_IN_LOSS": options.kl_in_loss,
        "ESTIMATOR": options.kl_estimator,
        "HAS_WEIGHTS": tokens.weights is not None,
    }


def policy_tokens(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    *,
    needs_slope: bool = True,
    needs_entropy_slope: bool = True,
) -> Terms:
    dtype = tokens.dtype_with(logprobs, entropy)
    logp = logprobs.contiguous()
    n = logp.numel()
    programs, block = _blocks(n)
    entropy_in_loss = entropy is not None and options.entropy_in_loss
    needs_entropy_slope = needs_entropy_slope and entropy_in_loss
    terms = Terms(
        logp.new_empty((POLICY_SUMS, programs), dtype=dtype),
        logp.new_empty(logp.shape if needs_slope else (0,), dtype=dtype),
        logp.new_empty(logp.shape if needs_entropy_slope else (0,), dtype=dtype),
    )
    launch(
        policy_kernel,
        (programs,),
        logp,
        logp if tokens.old_logprobs is None else tokens.old_logprobs.contiguous(),
        tokens.advantages.contiguous(),
        as_loadable(tokens.mask),
        *(logp if x is None else x.contiguous() for x in (entropy, tokens.ref_logprobs, tokens.weights)),
        *terms,
        n,
        *policy_numbers(options),
        num_warps=_warps(block),
        HAS_ENTROPY=entropy is not None,
        ENTROPY_IN_LOSS=entropy_in_loss,
        SLOPE=needs_slope,
        ENTROPY_SLOPE=needs_entropy_slope,
        BLOCK=block,
        **policy_choices(tokens, options),
    )
    return terms


def value_tokens(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    weights: Tensor | None,
    needs_slope: bool = True,
) -> Terms:
    dtype = dtype_of(values, old_values, returns, weights)
    v = values.contiguous()
    n = v.numel()
    programs, block = _blocks(n)
    sums = v.new_empty((VALUE_SUMS, programs), dtype=dtype)
    slope = v.new_empty(v.shape if needs_slope else (0,), dtype=dtype)
    launch(
        value_kernel,
        (programs,),
        v,
        v if old_values is None else old_values.contiguous(),
        returns.contiguous(),
        as_loadable(mask),
        v if weights is None else weights.contiguous(),
        sums,
        slope,
        n,
        0.0 if clip is None else clip,
        num_warps=_warps(block),
        HAS_CLIP=clip is not None,
        HAS_WEIGHTS=weights is not None,
        SLOPE=needs_slope,
        BLOCK=block,
    )
    return Terms(sums, slope, v.new_empty((0,), dtype=dtype))


def finish(sums: Tensor, normalizer: float | Tensor | None) -> Finished:
    """Add up the programs' sums `[sums, programs]` and divide them; the last one is the number of valid tokens."""
    rows, programs = sums.shape
    columns = min(COLUMNS, triton.next_power_of_2(programs))
    result = Finished(sums.new_empty(()), sums.new_empty((rows,)), sums.new_empty(()))
    launch(
        finish_kernel,
        (1,),
        sums,
        normalizer.to(sums.device) if isinstance(normalizer, Tensor) else sums,
        *result,
        programs,
        0.0 if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer),
        num_warps=8 if columns > 256 else 4,
        NORMALIZER="tensor" if isinstance(normalizer, Tensor) else "count" if normalizer is None else "number",
        SUMS=rows,
        ROWS=triton.next_power_of_2(rows),
        COLUMNS=columns,
    )
    return result


def scale(
    grad: Tensor, divisor: Tensor, slope: Tensor, entropy_slope: Tensor, dtype: torch.dtype, entropy_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both derivatives times grad / divisor, in the dtypes of what they are the gradients of."""
    outs = slope.new_empty(slope.shape, dtype=dtype), entropy_slope.new_empty(entropy_slope.shape, dtype=entropy_dtype)
    n = max(slope.numel(), entropy_slope.numel())
    if n == 0:
        return outs
    programs, block = _blocks(n)
    launch(
        scale_kernel,
        (programs,),
        grad,
        divisor,
        slope,
        entropy_slope,
        *outs,
        n,
        num_warps=_warps(block),
        FIRST=slope.numel() > 0,
        SECOND=entropy_slope.numel() > 0,
        BLOCK=block,
    )
    return outs


def ppo_terms(
    logprobs: Tensor, entropy: Tensor | None, tokens: PolicyTokens, options: PolicyOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over the valid tokens, in the order of SUMS, and the derivatives of the first by logprobs and by entropy
    (None if that is not in the loss). No autograd.
    """
    terms = policy_tokens(logprobs, entropy, tokens, options)
    in_loss = entropy is not None and options.entropy_in_loss
    return finish(terms.sums, 1.0).totals, terms.slope, terms.entropy_slope if in_loss else None
