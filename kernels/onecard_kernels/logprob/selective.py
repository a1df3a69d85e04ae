"""selective_log_softmax: log-probabilities from logits, as registered operators on either backend."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, workspace
from ..double_backward import no_double_backward, no_forward_ad
from ..records import LogProbs, result_dtype
from . import torch_rows
from .tile_bytes import by_triton, even_chunk, id_bytes
from .torch_rows import STATS

SECOND_BACKWARD = (
    "a second backward through selective_log_softmax(inplace_backward=True): the first one wrote the gradient over the "
    "logits. Pass inplace_backward=False to go through the graph more than once."
)


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
    checks.reverse_mode_only("selective_log_softmax", logits=logits)
    temperature = checks.python_number(temperature)
    checks.logits(logits, targets, temperature, mask)
    if inplace_backward and any(n > 1 and stride == 0 for n, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("logits is expanded (stride 0), expected memory of its own for inplace_backward=True")
    backend = dispatch.resolve("selective_log_softmax", backend, logits.device)
    entropy = return_entropy or entropy_requires_grad
    # torch.compile does not allow the gradient of an operator to alias its inputs.
    if inplace_backward and not torch.compiler.is_compiling():
        logprobs, entropies = _InPlace.apply(logits, targets, mask, temperature, entropy, backend)
    else:
        logprobs, entropies, _ = torch.ops.onecard.selective_forward(
            logits, targets, mask, temperature, entropy, backend
        )
    if not entropy:
        return LogProbs(logprobs, None, None)
    return LogProbs(logprobs, entropies if entropy_requires_grad else entropies.detach(), None)


def _rows(backend: str) -> Any:
    """The module with `forward` and `backward` over rows of logits. The saved statistics differ between backends."""
    return torch_rows if backend == "torch" else import_module(".triton_rows", __package__)


@torch.library.custom_op("onecard::selective_forward", mutates_args=())
def _forward_op(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    checks.ids(targets, logits.shape[-1], mask)
    result: tuple[Tensor, Tensor, Tensor] = _rows(backend).forward(logits, targets, mask, temperature, entropy)
    return result


@_forward_op.register_fake
def _(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(logits.dtype)
    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty(targets.shape if entropy else (0,), dtype=dtype),
        logits.new_empty(STATS, targets.numel(), dtype=dtype),
    )


@torch.library.custom_op("onecard::selective_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    result: Tensor = _rows(backend).backward(logits, targets, mask, stats, grad_logprobs, grad_entropy, temperature)
    return result


@_backward_op.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, mask, ctx.temperature, ctx.entropy, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, mask, output[2])
    ctx.mark_non_differentiable(*output[2:] if ctx.entropy else output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprobs, grad_entropy = grads[0], grads[1] if ctx.entropy else None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 6
    grad = torch.ops.onecard.selective_backward(
        *ctx.saved_tensors, grad_logprobs, grad_entropy, ctx.temperature, ctx.backend
    )
    return grad, *(None,) * 5


_forward_op.register_autograd(no_double_backward(_backward), setup_context=_setup)
no_forward_ad("selective_log_softmax", _forward_op, _backward_op)


class _InPlace(torch.autograd.Function):
    """The same two passes, with the gradient written into the logits' storage."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        temperature: float,
        entropy: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        checks.ids(targets, logits.shape[-1], mask)
        ctx.temperature, ctx.entropy, ctx.backend, ctx.spent = temperature, entropy, backend, False
        logprobs, entropies, stats = _rows(backend).forward(logits, targets, mask, temperature, entropy)
        ctx.save_for_backward(logits, targets, mask, stats)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(SECOND_BACKWARD)
        grad_logprobs, grad_entropy = grads[0], grads[1] if ctx.entropy else None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        ctx.spent = True
        logits, *saved = ctx.saved_tensors
        # A detached alias shares the logits' version counter: other graphs that saved them raise.
        into = logits.detach()
        grad = _rows(ctx.backend).backward(logits, *saved, grad_logprobs, grad_entropy, ctx.temperature, out=into)
        return grad, *(None,) * 5


# ---------------------------------------------------------------------------------------------------------------------
# Peak bytes that the operators allocate inside (see `workspace`). `a` has an operator's arguments by name.


@workspace.formula("onecard::selective_forward")
def _forward_bytes(device: torch.device, a: SimpleNamespace) -> int:
    dtype = result_dtype(a.logits.dtype)
    if by_triton(device, a.backend, dtype):
        return 0
    masked = a.mask is not None
    stats = STATS * a.targets.numel() * dtype.itemsize
    return stats + _block_bytes(a.logits, 1 + a.entropy, masked=masked) + id_bytes(a.targets, masked=masked)


@workspace.formula("onecard::selective_backward")
def _backward_bytes(device: torch.device, a: SimpleNamespace) -> int:
    dtype, with_entropy = result_dtype(a.logits.dtype), a.grad_entropy is not None
    if by_triton(device, a.backend, dtype):
        return 0
    columns = (10 + 8 * with_entropy) * a.targets.numel() * dtype.itemsize
    return columns + _block_bytes(a.logits, 1 + with_entropy, masked=a.mask is not None)


def _block_bytes(logits: Tensor, blocks: int, *, masked: bool) -> int:
    """Bytes of `blocks` blocks of logits in the accumulation dtype, and of the gathered rows before the cast."""
    dtype, width, count = result_dtype(logits.dtype), logits.shape[-1], logits.shape[:-1].numel()
    rows = even_chunk(count, min(count, max(1, torch_rows.BLOCK_BYTES // (width * dtype.itemsize))))
    gathered = rows * width * logits.dtype.itemsize if masked else 0
    return rows * width * dtype.itemsize * (blocks + (count > rows)) + gathered  # the previous block is still there
