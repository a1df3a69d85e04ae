"""linear_logprobs: hidden states and a head to per-token log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import (
    Benchmark,
    Candidate,
    Function,
    LogProbs,
    Mode,
    Products,
    Unavailable,
    Work,
    attribute,
    eager_logprobs,
    ours,
    plain,
    takes,
    trl_logprobs,
)
from benchmarks.oracle import GRADIENT, NATS, Expected, Inputs, directions, exact_logprobs, head_gradient, sample
from benchmarks.records import OURS
from benchmarks.shapes import LINEAR, LINEAR_DTYPES, LOGIT_STD, Shape
from onecard_kernels.logprob import tuning

NAME = "linear_logprobs"
FORWARD, FROZEN, TRAINED = "forward", "frozen", "trained"
TENSORS = ("hidden", "weight", "targets")

# --- what all operations from hidden states share

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


def work(shape: Shape, itemsize: int, *, products: Products, token_bytes: int) -> Work:
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


# --- this one

TARGETS = 8  # bytes a token: read, int64
LOGPROBS = 4  # written, fp32
GRADIENT_OF_LOGPROBS = 4  # read, fp32
BACK = TARGETS + LOGPROBS + GRADIENT_OF_LOGPROBS
MODES = {
    FORWARD: Mode(
        "forward only (old and reference log-probabilities)",
        ("logp",),
        partial(work, products=Products(1), token_bytes=TARGETS + LOGPROBS),  # logits = hidden @ W.T
    ),
    FROZEN: Mode(
        FROZEN_ABOUT,
        ("logp",),
        partial(work, products=Products(1, 1), token_bytes=BACK),  # logits; dHidden = dLogits @ W
        {"dHidden": "hidden"},
    ),
    TRAINED: Mode(
        "forward + backward, trained head (gradients for the hidden states and the head)",
        ("logp",),
        partial(work, products=Products(1, 1, 1), token_bytes=BACK),  # and dW = dLogits.T @ hidden
        {"dHidden": "hidden", "dW": "weight"},
    ),
}


def expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    rows = sample(len(inputs["targets"]), inputs["targets"].device)
    some = {**inputs, "hidden": inputs["hidden"][rows], "targets": inputs["targets"][rows]}
    found = {"logp": Expected(exact_logprobs(some), rows)}
    if "dHidden" in wanted:
        found["dHidden"] = Expected(directions(inputs, rows) * inputs["grad"][rows, None].double(), rows)
    if "dW" in wanted:
        found["dW"] = head_gradient(inputs, inputs["grad"])
    return found


def call(linear_logprobs: Callable[..., object]) -> Function:
    return takes(linear_logprobs, TENSORS)


def variant(label: str, implementation: str, **only: tuple[str, ...]) -> Candidate:
    """The same with another implementation than the device's default."""

    def load(device: torch.device) -> Function:
        choice = tuning.TABLE.get(device.type)
        if choice is not None and choice.default == implementation:
            raise Unavailable(f"the default on this device: see {OURS}")
        return call(attribute("onecard_kernels", NAME))

    return Candidate(
        f"{OURS}, {label}", load, role="ours", around=lambda: tuning.override(implementation=implementation), **only
    )


def liger_logprobs() -> LogProbs:
    """The log-probabilities inside Liger's fused PPO and GRPO losses."""
    base = attribute("liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase")
    if not hasattr(base, "chunk_forward"):
        raise Unavailable("this Liger has no LigerFusedLinearPPOBase.chunk_forward")
    return lambda hidden, weight, targets: base.chunk_forward(hidden[None], weight, targets[None])[0]


def peer(make: Callable[[], LogProbs]) -> Callable[[torch.device], Function]:
    return lambda device: takes(make(), TENSORS)


def cut_cross_entropy(device: torch.device) -> Function:
    """CCE with its defaults, which skip small gradients on purpose."""
    if device.type != "cuda":
        raise Unavailable("its kernels are Triton: a GPU is needed")
    loss = attribute("cut_cross_entropy", "linear_cross_entropy")
    return takes(lambda hidden, weight, targets: -loss(hidden, weight, targets, reduction="none"), TENSORS)


BENCHMARK = Benchmark(
    name=NAME,
    about="hidden states and a head to per-token log-probabilities, without the [tokens, vocab] logits",
    modes=MODES,
    shapes=LINEAR,
    dtypes=LINEAR_DTYPES,
    inputs=make_inputs,
    expected=expected,
    bars={"logp": NATS, "dHidden": GRADIENT, "dW": GRADIENT},
    candidates=(
        ours(NAME, call),
        variant("low memory", "low_memory"),
        variant("chunked", "chunked"),
        variant("tiled", "tiled", modes=(FORWARD,), devices=("cuda",)),
        *plain(eager_logprobs, TENSORS),
        Candidate("TRL", peer(trl_logprobs)),
        Candidate("Liger", peer(liger_logprobs)),
        Candidate("cut-cross-entropy", cut_cross_entropy),
    ),
)
