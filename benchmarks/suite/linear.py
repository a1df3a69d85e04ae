"""What the benchmarks from hidden states share: inputs, and the work that none of them can avoid."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Products, Work
from benchmarks.oracle import Inputs
from benchmarks.shapes import LOGIT_STD, Shape

FROZEN_ABOUT = "forward + backward, frozen head (LoRA: a gradient for the hidden states alone)"


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Normal hidden states and head, scaled so that the logits have the standard deviation of a trained model's.

    Every second target is the most likely token, as most tokens of real text nearly are; the others are uniform.
    `grad` is what a loss sends back: another number for every token.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    tokens = shape["N"]
    hidden = normal(tokens, shape["D"]).to(dtype)
    weight = normal(shape["V"], shape["D"]).mul_(LOGIT_STD / shape["D"] ** 0.5).to(dtype)
    targets = torch.randint(shape["V"], (tokens,), generator=generator, device=device)
    for rows in torch.arange(0, tokens, 2, device=device).split(1024):  # in parts: never all logits at once
        targets[rows] = (hidden[rows] @ weight.t()).argmax(-1)
    return {"hidden": hidden, "weight": weight, "targets": targets, "grad": normal(tokens)}


def work(shape: Shape, itemsize: int, products: Products, *, token_bytes: int) -> Work:
    """`token_bytes`: what is read and written for each token besides hidden states and head."""
    n, d, v = shape["N"], shape["D"], shape["V"]
    one = 2 * n * d * v  # a multiply and an add for every (token, hidden, vocabulary) triple
    traffic = (
        n * d * itemsize  # read the hidden states
        + v * d * itemsize  # read the head
        + n * token_bytes
        + (n * d * itemsize if products.hidden else 0)  # write the gradient of the hidden states
        + (v * d * itemsize if products.head else 0)  # write the gradient of the head
    )
    return Work(traffic, products.count * one, products)
