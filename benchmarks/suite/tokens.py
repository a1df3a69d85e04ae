"""ppo_loss and value_loss: per-token tensors of a batch to PPO's losses. Launches are what their time is made of."""

from __future__ import annotations

from collections.abc import Collection

import torch

from benchmarks.harness import Benchmark, Mode, Work, ours, plain, takes
from benchmarks.oracle import GRADIENT, Bar, Expected, Inputs, largest
from benchmarks.shapes import FP32, TOKENS, Shape
from benchmarks.suite import formulas

FORWARD, BACKWARD = "forward", "backward"
POLICY = ("logprobs", "old_logprobs", "advantages", "mask")
VALUE = ("values", "old_values", "returns", "mask")
# A sum of some hundred thousand terms in fp32, whatever the order of summation
LOSS = Bar(largest, {torch.float32: 2e-5}, 1e-2)


def lengths_mask(shape: Shape, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Responses of half to all of T tokens, padded on the right."""
    t = shape["T"]
    lengths = torch.randint(t // 2, t + 1, (shape["B"], 1), generator=generator, device=device)
    return torch.arange(t, device=device) < lengths


def policy_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    logprobs = -2 * torch.rand(shape["B"], shape["T"], generator=generator, device=device)
    inputs = formulas.clip_share_inputs(logprobs.double(), seed)
    mask = lengths_mask(shape, generator, device)
    return {**inputs, "logprobs": logprobs, "mask": mask, "one": torch.ones((), device=device)}


def value_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(shape["B"], shape["T"], generator=generator, device=device)

    old = normal()
    return {
        "values": old + 0.15 * normal(),  # about one in five moved past the clip range
        "old_values": old,
        "returns": old + normal(),
        "mask": lengths_mask(shape, generator, device),
        "one": torch.ones((), device=device),
    }


def forward_work(shape: Shape, itemsize: int) -> Work:
    return Work(
        shape["B"]
        * shape["T"]
        * (
            3 * itemsize  # read three tensors
            + 1  # read the mask
        )
    )


def backward_work(shape: Shape, itemsize: int) -> Work:
    # write one gradient, which the forward may already have formed: nothing need be read again
    return Work(forward_work(shape, itemsize).bytes + shape["B"] * shape["T"] * itemsize)


def modes(name: str, tensor: str) -> dict[str, Mode]:
    return {
        FORWARD: Mode("forward, with what its backward needs", ("loss",), forward_work, tracked=(tensor,)),
        BACKWARD: Mode("forward + backward", ("loss",), backward_work, {name: tensor}, seed="one"),
    }


def policy_expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    loss, slopes = formulas.policy_oracle(inputs["logprobs"].double(), inputs)
    return {"loss": Expected(loss), "dLogp": Expected(slopes)}


def value_expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    loss, slopes = formulas.value_oracle(inputs)
    return {"loss": Expected(loss), "dValues": Expected(slopes)}


PPO_LOSS = Benchmark(
    name="ppo_loss",
    about="per-token log-probabilities to PPO's clipped policy loss and its metrics",
    modes=modes("dLogp", "logprobs"),
    shapes=TOKENS,
    dtypes=FP32,
    inputs=policy_inputs,
    expected=policy_expected,
    bars={"loss": LOSS, "dLogp": GRADIENT},
    candidates=(
        ours("ppo_loss", lambda function: takes(lambda *tensors: function(*tensors).loss, POLICY)),
        *plain(formulas.policy_loss, POLICY),
    ),
    launches=True,
)
VALUE_LOSS = Benchmark(
    name="value_loss",
    about="values to PPO's clipped value loss and its metric",
    modes=modes("dValues", "values"),
    shapes=TOKENS,
    dtypes=FP32,
    inputs=value_inputs,
    expected=value_expected,
    bars={"loss": LOSS, "dValues": GRADIENT},
    candidates=(
        ours("value_loss", lambda function: takes(lambda *tensors: function(*tensors).loss, VALUE)),
        *plain(formulas.value_loss, VALUE),
    ),
    launches=True,
)
