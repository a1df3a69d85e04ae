"""The library's functions as cases for the named regression tests: inputs, the call, and the plain equation beside it.

A case is a function on a backend, and for the linear ones in an implementation. Its value is one tensor, per token or
0-d, so that one test can go over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import onecard_kernels as library
from onecard_kernels.logprob import tuning
from onecard_kernels.logprob.tuning import TileConfig
from tests.closeness import LOGPROB_TOLERANCES
from tests.kernels import oracle

Tensors = dict[str, Tensor]
D, V = 8, 37
SHAPE = (2, 3)  # few: a program of the interpreter takes tens of milliseconds
EPS = torch.finfo(torch.float32).eps
TOLERANCE = LOGPROB_TOLERANCES[torch.float32, 4]
LOSS_TOLERANCE = 1e-4  # TOLERANCE on a log-probability, times a ratio below 2 and an advantage of 3 or so
COEFFICIENT = 0.3  # of the entropy where it has one
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()


@dataclass(frozen=True)
class Function:
    make: Callable[[tuple[int, ...], int, int], Tensors]
    call: Callable[..., Tensor]
    equation: Callable[..., Tensor]
    leaves: tuple[str, ...]
    per_token: bool


@dataclass(frozen=True)
class Case:
    name: str
    backend: str
    implementation: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.implementation, self.backend)))

    @property
    def function(self) -> Function:
        return FUNCTIONS[self.name]

    @property
    def leaves(self) -> tuple[str, ...]:
        return () if self.implementation == tuning.TILED else self.function.leaves

    @property
    def tolerance(self) -> float:
        return TOLERANCE if self.function.per_token else LOSS_TOLERANCE

    def make(self, shape: tuple[int, ...] = SHAPE, d: int = D, v: int = V, mask: Tensor | None = None) -> Tensors:
        data = self.function.make(shape, d, v)
        if "mask" in data and mask is not None:
            data["mask"] = mask
        elif "mask" in data and shape == SHAPE:
            data["mask"] = MASK.clone()
        return data

    @contextmanager
    def tiles(self, rows: int = 3, columns: int = 20) -> Iterator[None]:
        """More than one tile each way, the last one smaller."""
        if self.implementation == tuning.TILED:
            tile = TileConfig(16, 1 << (columns - 1).bit_length(), 16, 4, 2, at_once=1, multiprocessors=2, group=2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("onecard_kernels.logprob.triton_tiled.config_on", lambda *_: tile)
                with tuning.override(implementation=tuning.TILED):
                    yield
        else:
            with tuning.override(implementation=self.implementation, rows=rows, columns=columns):
                yield

    def call(self, **data: Any) -> Tensor:
        given = {} if self.name == "dpo_loss" else {"backend": self.backend}
        return self.function.call(**data, **given)


# --- inputs


def logit_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    return {
        "logits": torch.randn(*shape, v) * 4,
        "targets": torch.randint(v, shape),
        "mask": torch.ones(shape, dtype=torch.bool),
    }


def linear_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    rest = logit_inputs(shape, d, 1)
    return {
        "hidden": torch.randn(*shape, d),
        "weight": torch.randn(v, d) * 4 / d**0.5,
        "targets": torch.randint(v, shape),
        "mask": rest["mask"],
    }


def kl_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    data = linear_inputs(shape, d, v)
    del data["targets"]
    return {**data, "ref_hidden": data["hidden"] + 0.3 * torch.randn(*shape, d)}


def with_policy(data: Tensors, logp: Tensor) -> Tensors:
    """Log-ratios on both sides of the clip range, away from its borders."""
    offsets = torch.tensor([-0.6, -0.05, 0.1, 0.5, 1.2])
    shape = logp.shape
    old = logp.detach() - offsets[torch.arange(logp.numel()).view(shape) % 5]
    return {**data, "old_logprobs": old, "advantages": torch.randn(shape), "weights": torch.rand(shape) + 0.1}


def linear_policy_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    data: dict[str, Any] = linear_inputs(shape, d, v)
    return with_policy(data, oracle.linear_logprobs(**data).logprobs)


def logits_policy_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    data: dict[str, Any] = logit_inputs(shape, d, v)
    return with_policy(data, oracle.selective_log_softmax(**data).logprobs)


def policy_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    logp = -torch.rand(shape) * 5
    return with_policy({"logprobs": logp, "mask": torch.ones(shape, dtype=torch.bool)}, logp)


def value_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    names = ("values", "old_values", "returns")
    data = {name: torch.randn(shape) * 0.3 for name in names}
    return {**data, "weights": torch.rand(shape) + 0.1, "mask": torch.ones(shape, dtype=torch.bool)}


def gae_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    return {name: torch.randn(shape) for name in ("rewards", "values")} | {"mask": torch.ones(shape, dtype=torch.bool)}


def pair_inputs(shape: tuple[int, ...], d: int, v: int) -> Tensors:
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    n = torch.Size(shape).numel()
    return {name: -torch.rand(n) * 20 for name in names} | {"weights": torch.rand(n) + 0.1}


# --- equations, over the tokens that count


def policy_equation(
    logp: Tensor, entropy: Tensor | None, mask: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor
) -> Tensor:
    keep = mask.bool()
    a, d = advantages[keep], (logp[keep] - old_logprobs[keep]).clamp(-20.0, 20.0)
    loss = -torch.min(a * d.exp(), a * d.exp().clip(0.8, 1.2))
    if entropy is not None:
        loss = loss - COEFFICIENT * entropy[keep]
    return (weights[keep] * loss).sum() / max(1, int(keep.sum()))


def value_equation(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    keep = mask.bool()
    v, old, target = values[keep], old_values[keep], returns[keep]
    both = torch.stack([(v - target) ** 2, (old + (v - old).clip(-0.2, 0.2) - target) ** 2])
    return (weights[keep] * both.amax(0)).sum() / 2 / max(1, int(keep.sum()))


def gae_equation(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    advantages = torch.zeros_like(values)
    for row in range(values.shape[0]):
        carry = value = torch.zeros((), dtype=values.dtype)
        for t in reversed(range(values.shape[1])):
            if mask[row, t]:
                carry = rewards[row, t] + 0.99 * value - values[row, t] + 0.99 * 0.95 * carry
                value, advantages[row, t] = values[row, t], carry
    return torch.stack([advantages, torch.where(mask.bool(), advantages + values, 0.0)])


def kl_equation(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    logp, logq = ((h @ weight.T).log_softmax(-1) for h in (hidden, ref_hidden))
    return (logp.exp() * (logp - logq)).sum(-1).masked_fill(~mask.bool(), 0.0)


def pair_equation(weights: Tensor, **x: Tensor) -> Tensor:
    margin = (x["chosen_logps"] - x["ref_chosen_logps"]) - (x["rejected_logps"] - x["ref_rejected_logps"])
    return (weights * torch.nn.functional.softplus(-0.1 * margin)).mean()


def joined(out: Any) -> Tensor:
    """Log-probabilities and entropies as one number per token."""
    return out.logprobs + COEFFICIENT * out.entropy


def from_logits(entropy: bool) -> Callable[..., Tensor]:
    def equation(logits: Tensor, targets: Tensor, mask: Tensor, **policy: Tensor) -> Tensor:
        out = oracle.selective_log_softmax(logits, targets, mask=mask, entropy_requires_grad=True)
        return policy_equation(out.logprobs, out.entropy if entropy else None, mask, **policy)

    return equation


def from_hidden(entropy: bool) -> Callable[..., Tensor]:
    def equation(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        weights: Tensor,
        **head: Any,
    ) -> Tensor:
        out = oracle.linear_logprobs(hidden, weight, targets, mask=mask, entropy_requires_grad=True, **head)
        return policy_equation(out.logprobs, out.entropy if entropy else None, mask, old_logprobs, advantages, weights)

    return equation


H = " with entropy"
FUNCTIONS: dict[str, Function] = {
    "linear_logprobs": Function(
        linear_inputs,
        lambda **x: library.linear_logprobs(**x).logprobs,
        lambda **x: oracle.linear_logprobs(**x).logprobs,
        ("hidden",),
        True,
    ),
    "linear_logprobs" + H: Function(
        linear_inputs,
        lambda **x: joined(library.linear_logprobs(**x, entropy_requires_grad=True)),
        lambda **x: joined(oracle.linear_logprobs(**x, entropy_requires_grad=True)),
        ("hidden",),
        True,
    ),
    "linear_ppo_loss": Function(
        linear_policy_inputs, lambda **x: library.linear_ppo_loss(**x).loss, from_hidden(False), ("hidden",), False
    ),
    "linear_ppo_loss" + H: Function(
        linear_policy_inputs,
        lambda **x: library.linear_ppo_loss(**x, entropy_coef=COEFFICIENT).loss,
        from_hidden(True),
        ("hidden",),
        False,
    ),
    "linear_kl": Function(kl_inputs, library.linear_kl, kl_equation, ("hidden",), True),
    "selective_log_softmax": Function(
        logit_inputs,
        lambda **x: library.selective_log_softmax(**x).logprobs,
        lambda **x: oracle.selective_log_softmax(**x).logprobs,
        ("logits",),
        True,
    ),
    "selective_log_softmax" + H: Function(
        logit_inputs,
        lambda **x: joined(library.selective_log_softmax(**x, entropy_requires_grad=True)),
        lambda **x: joined(oracle.selective_log_softmax(**x, entropy_requires_grad=True)),
        ("logits",),
        True,
    ),
    "logits_ppo_loss": Function(
        logits_policy_inputs, lambda **x: library.logits_ppo_loss(**x).loss, from_logits(False), ("logits",), False
    ),
    "logits_ppo_loss" + H: Function(
        logits_policy_inputs,
        lambda **x: library.logits_ppo_loss(**x, entropy_coef=COEFFICIENT).loss,
        from_logits(True),
        ("logits",),
        False,
    ),
    "ppo_loss": Function(
        policy_inputs,
        lambda **x: library.ppo_loss(**x).loss,
        lambda logprobs, **x: policy_equation(logprobs, None, **x),
        ("logprobs",),
        False,
    ),
    "value_loss": Function(value_inputs, lambda **x: library.value_loss(**x).loss, value_equation, ("values",), False),
    "gae": Function(gae_inputs, lambda **x: torch.stack(library.gae(**x, gamma=0.99)), gae_equation, (), False),
    "dpo_loss": Function(
        pair_inputs,
        lambda **x: library.dpo_loss(**x).loss,
        pair_equation,
        ("chosen_logps", "rejected_logps"),
        False,
    ),
}
