"""The shapes that are timed: names, sizes by axis, and which of them belong to a run.

N is the number of scored tokens (response tokens of a batch), D the hidden size, V the vocabulary; B x T a batch of
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

LOGIT_STD = 4.0  # of a trained model; random initialisation gives about 1, which hides rounding
ROTATE_BELOW = 512 << 20  # bytes; smaller inputs may live in a cache, so two copies take turns
LINEAR_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
FP32 = {"cpu": torch.float32, "cuda": torch.float32}


@dataclass(frozen=True)
class Shape:
    name: str
    sizes: Mapping[str, int]  # by axis, in the order of the heading

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    def __str__(self) -> str:
        return " x ".join(map(str, self.sizes.values()))


@dataclass(frozen=True)
class Shapes:
    """Of an operation on a device. What compiles for long is timed at the first shape alone."""

    usual: tuple[Shape, ...]
    quick: tuple[Shape, ...]  # to see that it runs: too small for ratios to mean much
    every: tuple[Shape, ...] = ()  # of --all-shapes; empty: the usual ones

    def of(self, *, quick: bool, every: bool) -> tuple[Shape, ...]:
        return self.quick if quick else (self.every or self.usual) if every else self.usual


def linear(name: str, tokens: int, hidden: int, vocab: int) -> Shape:
    return Shape(name, {"N": tokens, "D": hidden, "V": vocab})


def logits(name: str, tokens: int, vocab: int) -> Shape:
    return Shape(name, {"N": tokens, "V": vocab})


def batch(rows: int, columns: int) -> Shape:
    return Shape(f"{rows}x{columns}", {"B": rows, "T": columns})


# (D, V) of real models
HEADS = {
    "llama3-8b": (4096, 128256),  # Llama 3.1 8B
    "qwen2.5-0.5b": (896, 151936),  # Qwen2.5 0.5B: narrow and wide, the head is a quarter of the model
    "gemma2-2b": (2304, 256000),  # Gemma 2 2B: the widest vocabulary in common use
    "tinyllama": (2048, 32000),  # TinyLlama 1.1B; Llama 2's vocabulary
    "llama3-1b": (2048, 128256),  # Llama 3.2 1B
    "qwen2.5-7b": (3584, 152064),  # Qwen2.5 7B
}
MAIN = "llama3-8b"
FEW_MODELS = (MAIN, "qwen2.5-0.5b", "gemma2-2b")  # the usual head, the narrowest, the widest vocabulary


def of_model(model: str, tokens: int) -> Shape:
    return linear(f"{model}-{tokens // 1024}k", tokens, *HEADS[model])


EVERY = tuple(of_model(model, tokens) for tokens in (8192, 2048, 16384) for model in HEADS)
GPT2 = linear("gpt2-medium-2k", 2048, 1024, 50257)  # a vocabulary that is no multiple of anything
LLAMA2 = linear("llama2-vocab-1k", 1024, 512, 32000)  # stories110M-sized hidden states, Llama 2's vocabulary
SMALL = linear("quick", 512, 256, 8192)
QUICK_BATCH = Shape("quick", {"B": 16, "T": 128})
CUDA_QUICK = (of_model("llama3-1b", 2048),)
CUDA_LINEAR = Shapes(
    (*(of_model(model, 8192) for model in HEADS), of_model(MAIN, 2048), of_model(MAIN, 16384)), CUDA_QUICK, EVERY
)
CUDA_FEW = tuple(of_model(model, 8192) for model in FEW_MODELS)

# By device. The longer list for what the library stands for, the shorter one for what is built from it.
LINEAR = {"cpu": Shapes((GPT2, LLAMA2), (SMALL,)), "cuda": CUDA_LINEAR}
LINEAR_LOSS = {"cpu": Shapes((GPT2,), (SMALL,), (GPT2, LLAMA2)), "cuda": CUDA_LINEAR}
LINEAR_FEW = {"cpu": Shapes((LLAMA2,), (SMALL,), (LLAMA2, GPT2)), "cuda": Shapes(CUDA_FEW, CUDA_QUICK, EVERY)}
WIDE = tuple(logits(f"{model}-logits-8k", 8192, HEADS[model][1]) for model in ("qwen2.5-0.5b", MAIN, "gemma2-2b"))
LOGITS = {
    "cpu": Shapes((logits("gpt2-logits-1k", 1024, 50257),), (logits("quick", 256, 8192),)),
    "cuda": Shapes(WIDE, (logits("quick", 1024, 128256),), (*WIDE, logits("tinyllama-logits-8k", 8192, 32000))),
}
TOKENS = {"cpu": Shapes((batch(64, 1024),), (QUICK_BATCH,)), "cuda": Shapes((batch(64, 4096),), (QUICK_BATCH,))}
ROWS = {device: Shapes((batch(64, 1024), batch(64, 4096)), (QUICK_BATCH,)) for device in ("cpu", "cuda")}
