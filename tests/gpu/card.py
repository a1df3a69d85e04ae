"""Sizes, devices and inputs of the tests of this folder. They run on a GPU at real sizes, else dry.

A dry run is the same code at small sizes on the CPU. It shows that a test's own code works, and nothing about a GPU.
Checks that need a GPU, such as allocator statistics, are skipped in a dry run, with a reason.
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
    """`real` on a GPU; `dry` without one and under `python -m benchmarks.sanitize`."""
    return real if CARD and "ONECARD_SMALL_SIZES" not in os.environ else dry


def card_only(why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not CARD, reason=f"needs a CUDA GPU: {why}")


BF16, FP32 = torch.bfloat16, torch.float32
HALF = {"bf16": BF16, "fp16": torch.float16}
DTYPES = {**HALF, "fp32": FP32}

# LlamaConfig arguments of a model large enough that the GPU dominates the time of a step
LLAMA = {
    "vocab_size": 4096, "hidden_size": sized(1024, 64), "intermediate_size": sized(2816, 96),
    "num_hidden_layers": sized(12, 3), "num_attention_heads": sized(16, 4), "num_key_value_heads": sized(4, 2),
    "max_position_embeddings": 4096,
}  # fmt: skip

SHAPES: list[Shape] = sized(
    [
        (1100, 896, 151936),  # most tokens: two chunks and a remainder
        (300, 4096, 128256),  # widest hidden states
        (256, 2304, 256000),  # largest vocabulary
        (64, 768, 50257),  # odd vocabulary, not a multiple of a block
    ],
    # under the sanitizer also a shape of several blocks of rows and columns
    [(9, 16, 131), (131, 72, 4099)] if CARD else [(9, 16, 131)],
)
# bf16 at all shapes; fp16 and fp32 only at the first shape (most tokens) and the last (odd vocabulary)
SHAPES_AND_DTYPES = [
    (shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == "bf16" or shape in (SHAPES[0], SHAPES[-1])
]
over_sizes = pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)

IMPLEMENTATIONS = (tuning.CHUNKED, tuning.LOW_MEMORY)
over_backends = pytest.mark.parametrize("backend", BACKENDS)


def over_paths(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test with both backends and each implementation that computes gradients."""
    return over_backends(pytest.mark.parametrize("implementation", IMPLEMENTATIONS)(test))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def inputs(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and targets: logits of standard deviation 4, and a last target in the last column."""
    targets = torch.randint(v, (n,), device=DEVICE)
    targets[-1] = v - 1
    return normal(n, d).to(dtype), (normal(v, d) * 4 / d**0.5).to(dtype), targets


def in_parts(n: int, rows: int = 128) -> Iterator[slice]:
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def truth(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the gradient of `hidden`, computed by the oracle in `dtype` for a few rows at a time."""
    head, values, grads = weight.detach().to(dtype), [], []
    for part in in_parts(hidden.shape[0]):
        leaf = hidden[part].detach().to(dtype).requires_grad_()
        logp = oracle.linear_logprobs(leaf, head, targets[part]).logprobs
        grads.append(torch.autograd.grad(logp, leaf, upstream[part].to(logp))[0])
        values.append(logp.detach())
    return torch.cat(values), torch.cat(grads)
