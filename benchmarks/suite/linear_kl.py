"""linear_kl: two policies' hidden states and a head to the exact KL divergence of each token, frozen head."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Candidate, Function, Mode, Products, Work, attribute, ours, plain, takes
from benchmarks.oracle import NATS, Bar, Expected, Inputs, overall, sample
from benchmarks.shapes import LINEAR_DTYPES, LINEAR_FEW, Shape
from benchmarks.suite import linear_logprobs as linear

NAME = "linear_kl"
FORWARD, FROZEN = "forward", "frozen"
TENSORS = ("hidden", "ref_hidden", "weight")
MOVED = 0.1  # of the hidden states' standard deviation: logits move by 0.4, the KL is about 0.1 nat


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    inputs = linear.make_inputs(shape, device, dtype, seed)
    generator = torch.Generator(device).manual_seed(seed + 1000)
    step = torch.randn(inputs["hidden"].shape, generator=generator, device=device)
    return {**inputs, "ref_hidden": (inputs["hidden"] + MOVED * step).to(dtype)}


def forward_work(shape: Shape, itemsize: int) -> Work:
    per_token = (
        shape["D"] * itemsize  # read the reference's hidden states
        + 4  # write the divergences, fp32
    )
    return linear.work(shape, itemsize, products=Products(2), token_bytes=per_token)  # two policies' logits


def frozen_work(shape: Shape, itemsize: int) -> Work:
    per_token = shape["D"] * itemsize + 4 + 4  # and read the gradient of the divergences, fp32
    return linear.work(shape, itemsize, products=Products(2, 1), token_bytes=per_token)  # two policies' logits; dHidden


def expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    rows = sample(len(inputs["hidden"]), inputs["hidden"].device)
    weight = inputs["weight"].double()
    own, reference = ((inputs[name][rows].double() @ weight.t()).log_softmax(-1) for name in ("hidden", "ref_hidden"))
    p, difference = own.exp(), own - reference
    kl = (p * difference).sum(-1)
    found = {"kl": Expected(kl, rows)}
    if "dHidden" in wanted:
        slope = p * (difference - kl[:, None])  # dKL/dz
        found["dHidden"] = Expected(slope @ weight * inputs["grad"][rows, None].double(), rows)
    return found


def eager_kl(hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> Tensor:
    own = torch.log_softmax(hidden @ weight.t(), -1, dtype=torch.float32)
    reference = torch.log_softmax(ref_hidden @ weight.t(), -1, dtype=torch.float32)
    return (own.exp() * (own - reference)).sum(-1)


def trl(device: torch.device) -> Function:
    """TRL's chunked divergence of its distillation trainer: beta 1 is KL(student || teacher)."""
    function = attribute("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    return takes(lambda hidden, ref, weight: function.apply(hidden, weight, None, ref, weight, None, 1.0), TENSORS)


BENCHMARK = Benchmark(
    name=NAME,
    about="the exact KL divergence of each token between two policies that share a head, from hidden states",
    modes={
        FORWARD: Mode("forward only", ("kl",), forward_work),
        FROZEN: Mode(linear.FROZEN_ABOUT, ("kl",), frozen_work, {"dHidden": "hidden"}),
    },
    shapes=LINEAR_FEW,
    dtypes=LINEAR_DTYPES,
    inputs=make_inputs,
    expected=expected,
    bars={"kl": NATS, "dHidden": Bar(overall)},
    candidates=(
        ours(NAME, lambda function: takes(function, TENSORS)),
        *plain(eager_kl, TENSORS),
        Candidate("TRL", trl),
    ),
)
