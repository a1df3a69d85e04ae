"""The shapes that are timed, the random inputs of each, and the work that no implementation can avoid.

N is the number of scored tokens (response tokens of a batch), D the hidden size, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORWARD, FROZEN, TRAINED = "forward", "frozen", "trained"
MODES = {
    FORWARD: "forward only (old and reference log-probabilities)",
    FROZEN: "forward + backward, frozen head (LoRA: a gradient for the hidden states alone)",
    TRAINED: "forward + backward, trained head (gradients for the hidden states and the head)",
}
LOGIT_STD = 4.0  # of a trained model; random initialisation gives about 1, which hides rounding
ROTATE_BELOW = 512 << 20  # bytes; smaller inputs may live in a cache, so two copies take turns


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.hidden} x {self.vocab}"


# (D, V) of real models
HEADS = {
    "tinyllama": (2048, 32000),  # TinyLlama 1.1B; Llama 2's vocabulary
    "qwen2.5-0.5b": (896, 151936),  # Qwen2.5 0.5B: narrow and wide, the head is a quarter of the model
    "llama3-1b": (2048, 128256),  # Llama 3.2 1B
    "llama3-8b": (4096, 128256),  # Llama 3.1 8B
    "qwen2.5-7b": (3584, 152064),  # Qwen2.5 7B
    "gemma2-2b": (2304, 256000),  # Gemma 2 2B: the widest vocabulary in common use
}
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": (
        Shape("llama2-vocab-1k", 1024, 512, 32000),  # stories110M-sized hidden states, Llama 2's vocabulary
        Shape("gpt2-medium-2k", 2048, 1024, 50257),  # GPT-2 medium; a vocabulary that is no multiple of anything
    ),
    "cuda": tuple(
        Shape(f"{model}-{tokens // 1024}k", tokens, *head)
        for model, head in HEADS.items()
        for tokens in (2048, 8192, 16384)
    ),
}
# To see the bench work, not to measure: too small for ratios to mean much.
QUICK: dict[str, tuple[Shape, ...]] = {
    "cpu": (Shape("quick", 512, 256, 8192),),
    "cuda": (Shape("llama3-1b-2k", 2048, 2048, 128256),),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    targets: torch.Tensor  # [N], int64
    grad: torch.Tensor  # [N], fp32: what a loss sends back; another number for every token

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.weight, self.targets, self.grad))


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Normal hidden states and head, scaled so that the logits have the standard deviation of a trained model's.

    Every second target is the most likely token, as most tokens of real text nearly are; the others are uniform.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(shape.tokens, shape.hidden).to(dtype)
    weight = normal(shape.vocab, shape.hidden).mul_(LOGIT_STD / shape.hidden**0.5).to(dtype)
    targets = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    for rows in torch.arange(0, shape.tokens, 2, device=device).split(1024):  # in parts: never all logits at once
        targets[rows] = (hidden[rows] @ weight.t()).argmax(-1)
    return Inputs(hidden, weight, targets, normal(shape.tokens))


def input_sets(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """One set of inputs, or two that take turns when one might stay in a cache from call to call."""
    first = make_inputs(shape, device, dtype)
    return [first] if first.bytes >= ROTATE_BELOW else [first, make_inputs(shape, device, dtype, seed=1)]


@dataclass(frozen=True)
class Work:
    """A lower bound: what every correct implementation must compute and move at least once."""

    gemms: int  # matrix products between the tokens and the head
    flops: int
    bytes: int


def work_of(shape: Shape, mode: str, itemsize: int) -> Work:
    n, d, v = shape.tokens, shape.hidden, shape.vocab
    one = 2 * n * d * v  # a multiply and an add for every (token, hidden, vocabulary) triple
    traffic = (
        n * d * itemsize  # read the hidden states
        + v * d * itemsize  # read the head
        + n * 8  # read the targets, int64
        + n * 4  # write the log-probabilities, fp32
    )
    if mode == FORWARD:
        return Work(1, one, traffic)  # logits = hidden @ W.T
    traffic += (
        n * 4  # read the gradient of the log-probabilities, fp32
        + n * d * itemsize  # write the gradient of the hidden states
    )
    if mode == FROZEN:
        return Work(2, 2 * one, traffic)  # logits; dHidden = dLogits @ W
    traffic += v * d * itemsize  # write the gradient of the head
    return Work(3, 3 * one, traffic)  # logits; dHidden; dW = dLogits.T @ hidden
