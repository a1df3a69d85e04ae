"""gae: rewards and values to generalized advantages. A recursion over T, which a plain trainer runs in Python."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from benchmarks.harness import COMPILE, EAGER, Benchmark, Candidate, Mode, Work, absent, ours, takes
from benchmarks.oracle import GRADIENT, Expected, Inputs
from benchmarks.shapes import FP32, ROWS, Shape
from benchmarks.suite.tokens import lengths_mask

NAME = "gae"
FORWARD = "forward"
GAMMA, LAMBDA = 1.0, 0.95
TENSORS = ("rewards", "values", "mask")


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Padding on the right, with zeros there: what the plain loop, which knows no mask, can be given too."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = lengths_mask(shape, generator, device)
    rewards, values = (torch.randn(mask.shape, generator=generator, device=device) * mask for _ in range(2))
    return {"rewards": rewards, "values": values, "mask": mask}


def work(shape: Shape, itemsize: int) -> Work:
    return Work(
        shape["B"]
        * shape["T"]
        * (
            2 * itemsize  # read the rewards and the values
            + 1  # read the mask
            + 2 * itemsize  # write the advantages and the returns
        )
    )


def expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    """A_t = sum_s (gamma lambda)^(s - t) delta_s, as a product with a triangular matrix: no recursion."""
    rewards, values = inputs["rewards"].double(), inputs["values"].double()
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    steps = torch.arange(rewards.shape[1], device=rewards.device, dtype=torch.float64)
    distance = steps[:, None] - steps
    decay = torch.where(distance >= 0, (GAMMA * LAMBDA) ** distance.clamp_min(0), 0.0)
    advantages = (rewards + GAMMA * following - values) @ decay
    return {"advantages": Expected(advantages), "returns": Expected(advantages + values)}


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As TRL's removed `PPOTrainer` had it; it zeroed what is masked beforehand."""
    length = rewards.shape[1]
    last: Tensor | float = 0.0
    reversed_advantages = []
    for t in reversed(range(length)):
        following: Tensor | float = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        last = delta + GAMMA * LAMBDA * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


BENCHMARK = Benchmark(
    name=NAME,
    about="rewards and values to generalized advantages and returns; eager is a Python loop over T",
    modes={FORWARD: Mode("forward only", ("advantages", "returns"), work)},
    shapes=ROWS,
    dtypes=FP32,
    inputs=make_inputs,
    expected=expected,
    bars={"advantages": GRADIENT, "returns": GRADIENT},
    candidates=(
        ours(NAME, lambda function: takes(lambda *t: function(*t, gamma=GAMMA, lam=LAMBDA), TENSORS, 2)),
        Candidate(EAGER, lambda device: takes(loop, TENSORS, 2)),
        absent(COMPILE, "it unrolls the loop over T: compiling takes many minutes"),
    ),
    launches=True,
)
