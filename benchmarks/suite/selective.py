"""selective_log_softmax: logits to the targets' log-probabilities and the entropies (for logging, without gradient)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Candidate, Function, Mode, Work, absent, attribute, ours, plain, takes
from benchmarks.oracle import GRADIENT, LOGPROB_BARS, NATS, PEER_NATS, Bar, Expected, Inputs, largest, sample
from benchmarks.records import OURS
from benchmarks.shapes import LINEAR_DTYPES, LOGIT_STD, LOGITS, Shape

NAME = "selective_log_softmax"
FORWARD, BACKWARD = "forward", "backward"
TENSORS = ("logits", "targets")


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    n, v = shape["N"], shape["V"]
    logits = torch.empty(n, v, dtype=dtype, device=device)
    for part in logits.split(1024):
        part.copy_(torch.randn(part.shape, generator=generator, device=device).mul_(LOGIT_STD))
    targets = torch.randint(v, (n,), generator=generator, device=device)
    targets[::2] = logits[::2].argmax(-1)  # as most tokens of real text nearly are
    return {"logits": logits, "targets": targets, "grad": torch.randn(n, generator=generator, device=device)}


def forward_work(shape: Shape, itemsize: int) -> Work:
    n, v = shape["N"], shape["V"]
    return Work(
        n * v * itemsize  # read the logits, once
        + n * 8  # read the targets, int64
        + n * 8  # write the log-probabilities and the entropies, fp32
    )


def backward_work(shape: Shape, itemsize: int) -> Work:
    n, v = shape["N"], shape["V"]
    return Work(
        forward_work(shape, itemsize).bytes
        + n * v * itemsize  # read the logits again
        + n * 4  # read the gradient of the log-probabilities, fp32
        + n * v * itemsize  # write the gradient of the logits
    )


def expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    rows = sample(len(inputs["targets"]), inputs["targets"].device)
    targets = inputs["targets"][rows, None]
    logp = inputs["logits"][rows].double().log_softmax(-1)
    p = logp.exp()
    found = {
        "logp": Expected(logp.gather(-1, targets).squeeze(-1), rows),
        "entropy": Expected(-(p * logp).sum(-1), rows),
    }
    if "dLogits" in wanted:
        slope = (-p).scatter_add(-1, targets, torch.ones_like(targets, dtype=p.dtype))
        found["dLogits"] = Expected(slope * inputs["grad"][rows, None].double(), rows)
    return found


def call(function: Callable[..., Any], **settings: bool) -> Function:
    return takes(lambda *tensors: function(*tensors, return_entropy=True, **settings), TENSORS, 2)


def in_place(device: torch.device) -> Function:
    return call(attribute("onecard_kernels", NAME), inplace_backward=True)


def copied(inputs: Inputs) -> Inputs:
    """Logits to overwrite."""
    return {**inputs, "logits": inputs["logits"].clone()}


def eager_formula(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1, dtype=torch.float32)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


def trl(device: torch.device) -> Function:
    """TRL's function for trainers: Triton on a GPU, a loop over rows and chunks of the softmax elsewhere."""
    function = attribute("trl.trainer.utils", "selective_log_softmax_and_entropy")
    return takes(lambda logits, targets: function(logits, targets, entropy_requires_grad=False), TENSORS, 2)


BENCHMARK = Benchmark(
    name=NAME,
    about="logits to the targets' log-probabilities and the entropies; the entropy is for logging, without a gradient",
    modes={
        FORWARD: Mode("forward only", ("logp", "entropy"), forward_work),
        BACKWARD: Mode("forward + backward", ("logp", "entropy"), backward_work, {"dLogits": "logits"}),
    },
    shapes=LOGITS,
    dtypes=LINEAR_DTYPES,
    inputs=make_inputs,
    expected=expected,
    # The entropy is a difference of two numbers of about the largest logit's size, 20
    bars={"logp": NATS, "entropy": Bar(largest, LOGPROB_BARS, PEER_NATS), "dLogits": GRADIENT},
    candidates=(
        ours(NAME, call),
        Candidate(f"{OURS}, in place", in_place, role="ours", modes=(BACKWARD,), prepare=copied),
        *plain(eager_formula, TENSORS, 2),
        Candidate("TRL", trl),
        absent("Liger", "its selective log-softmax gives no entropy, and no gradient"),
        absent("cut-cross-entropy", "it starts from hidden states"),
    ),
)
