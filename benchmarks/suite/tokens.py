"""ppo_loss, value_loss and gae: from per-token tensors of a batch. Most of their time is launches."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from benchmarks.harness import COMPILE, EAGER, Benchmark, Candidate, Mode, Work, absent, ours, plain, takes
from benchmarks.oracle import GRADIENT, Bar, Expected, Inputs, largest
from benchmarks.shapes import FP32, ROWS, TOKENS, Shape
from benchmarks.suite import formulas

FORWARD, BACKWARD = "forward", "backward"
POLICY = ("logprobs", "old_logprobs", "advantages", "mask")
VALUE = ("values", "old_values", "returns", "mask")
# A sum of some hundred thousand terms in fp32, whatever the order of summation
LOSS = Bar(largest, {torch.float32: 2e-5}, 1e-2)


def lengths_mask(shape: Shape, generator: torch.Generator, device: torch.device) -> Tensor:
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

    def normal() -> Tensor:
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


# --- generalized advantage estimation: a recursion over T, which a plain trainer runs in Python

GAMMA, LAMBDA = 1.0, 0.95
GAE = ("rewards", "values", "mask")


def gae_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Padding on the right, with zeros there: what the plain loop, which knows no mask, can be given too."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = lengths_mask(shape, generator, device)
    rewards, values = (torch.randn(mask.shape, generator=generator, device=device) * mask for _ in range(2))
    return {"rewards": rewards, "values": values, "mask": mask}


def gae_work(shape: Shape, itemsize: int) -> Work:
    return Work(
        shape["B"]
        * shape["T"]
        * (
            2 * itemsize  # read the rewards and the values
            + 1  # read the mask
            + 2 * itemsize  # write the advantages and the returns
        )
    )


def gae_expected(inputs: Inputs, wanted: Collection[str]) -> dict[str, Expected]:
    """A_t = sum_s (gamma lambda)^(s - t) delta_s, as a product with a triangular matrix: no recursion."""
    rewards, values = inputs["rewards"].double(), inputs["values"].double()
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    steps = torch.arange(rewards.shape[1], device=rewards.device, dtype=torch.float64)
    distance = steps[:, None] - steps
    decay = torch.where(distance >= 0, (GAMMA * LAMBDA) ** distance.clamp_min(0), 0.0)
    advantages = (rewards + GAMMA * following - values) @ decay
    return {"advantages": Expected(advantages), "returns": Expected(advantages + values)}


def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
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


GAE_BENCHMARK = Benchmark(
    name="gae",
    about="rewards and values to generalized advantages and returns; eager is a Python loop over T",
    modes={FORWARD: Mode("forward only", ("advantages", "returns"), gae_work)},
    shapes=ROWS,
    dtypes=FP32,
    inputs=gae_inputs,
    expected=gae_expected,
    bars={"advantages": GRADIENT, "returns": GRADIENT},
    candidates=(
        ours("gae", lambda function: takes(lambda *t: function(*t, gamma=GAMMA, lam=LAMBDA), GAE, 2)),
        Candidate(EAGER, lambda device: takes(gae_loop, GAE, 2)),
        absent(COMPILE, "it unrolls the loop over T: compiling takes many minutes"),
    ),
    launches=True,
)
