"""Where the tests of this folder run: on a GPU at real sizes, or dry: the same lines at small sizes on the CPU.

A dry run shows that a test's own code works, and nothing about a GPU. What only a card has, such as the memory that it
says it allocated, is skipped there with a reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from onecard_kernels import launch
from onecard_kernels.logprob import tuning
from tests.kernels import oracle

CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CARD else "cpu")
needs_triton = pytest.mark.skipif(launch.unavailable_reason(DEVICE) is not None, reason="triton does not run here")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]

T = TypeVar("T")
Shape = tuple[int, int, int]  # tokens, hidden size, vocabulary


def sized(real: T, dry: T) -> T:
    """What a card gets, or its small stand-in: without a card, and under `python -m benchmarks.sanitize`."""
    return real if CARD and "ONECARD_SMALL_SIZES" not in os.environ else dry


def card_only(why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not CARD, reason=f"needs a CUDA GPU: {why}")


BF16, FP32 = torch.bfloat16, torch.float32
LOW = {"bf16": BF16, "fp16": torch.float16}
DTYPES = {**LOW, "fp32": FP32}

# A model that takes a GPU's time; of transformers' LlamaConfig
LLAMA = {
    "vocab_size": 4096, "hidden_size": sized(1024, 64), "intermediate_size": sized(2816, 96),
    "num_hidden_layers": sized(12, 3), "num_attention_heads": sized(16, 4), "num_key_value_heads": sized(4, 2),
    "max_position_embeddings": 4096,
}  # fmt: skip

# Two chunks and a rest; the widest hidden states, and the largest vocabulary; odd rows of the head
SHAPES: list[Shape] = sized(
    [(1100, 896, 151936), (300, 4096, 128256), (256, 2304, 256000), (64, 768, 50257)],
    [(9, 16, 131), (131, 72, 4099)] if CARD else [(9, 16, 131)],  # under the sanitizer several blocks each way too
)
# bf16 at all of them; the other dtypes where tokens are many, and where the head is awkward to a block
SIZES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == "bf16" or shape in (SHAPES[0], SHAPES[-1])]
over_sizes = pytest.mark.parametrize(("shape", "dtype"), SIZES, ids=str)

IMPLEMENTATIONS = (tuning.CHUNKED, tuning.LOW_MEMORY)
over_backends = pytest.mark.parametrize("backend", BACKENDS)


def over_paths(test: Callable[..., None]) -> Callable[..., None]:
    """Both backends in each implementation that forms gradients."""
    return over_backends(pytest.mark.parametrize("implementation", IMPLEMENTATIONS)(test))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def inputs(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and head whose logits have a standard deviation of 4; the last target is the last column."""
    targets = torch.randint(v, (n,), device=DEVICE)
    targets[-1] = v - 1
    return normal(n, d).to(dtype), (normal(v, d) * 4 / d**0.5).to(dtype), targets


def in_parts(n: int, rows: int = 128) -> Iterator[slice]:
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def truth(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the gradient by hidden in `dtype`, a few rows at a time."""
    head, values, grads = weight.detach().to(dtype), [], []
    for part in in_parts(hidden.shape[0]):
        leaf = hidden[part].detach().to(dtype).requires_grad_()
        logp = oracle.linear_logprobs(leaf, head, targets[part]).logprobs
        grads.append(torch.autograd.grad(logp, leaf, upstream[part].to(logp))[0])
        values.append(logp.detach())
    return torch.cat(values), torch.cat(grads)
