"""Shared by the three policy losses: options, per-token inputs, and the sums of the loss and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .. import checks
from ..kl.token_kl import ESTIMATORS
from ..logprob.rows import Rows
from ..records import result_dtype

# Sums over tokens: the loss, the metrics, and the number of valid tokens.
SUMS = ("loss", "policy/approxkl", "policy/clipfrac", "val/ratio", "policy/entropy", "policy/kl", "tokens")
VALUE_SUMS = ("loss", "val/clipfrac", "tokens")


class PolicyOptions(NamedTuple):
    """Numbers and choices of the loss, see `ppo_loss`. Operators take them in this order (`OPTIONS_SCHEMA`)."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float
    kl_coef: float
    kl_estimator: str

    @property
    def entropy_in_loss(self) -> bool:
        return self.entropy_coef != 0.0

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef != 0.0

    def check(self) -> None:
        checks.within("clip_low", self.clip_low, 0.0, 1.0)
        checks.at_least("clip_high", self.clip_high, 0.0)
        if self.dual_clip is not None:
            checks.above("dual_clip", self.dual_clip, 1.0)
        checks.finite("entropy_coef", self.entropy_coef)
        checks.finite("kl_coef", self.kl_coef)
        checks.one_of("kl_estimator", self.kl_estimator, ESTIMATORS)


_SCHEMA_TYPES = {float: "float", float | None: "float?", str: "str"}
OPTIONS_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(PolicyOptions).items())


class PolicyTokens(NamedTuple):
    """The loss's per-token inputs without a gradient, all of one shape, see `ppo_loss`. Operators take this order."""

    old_logprobs: Tensor | None  # None: those of the current policy
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None

    def check(self, like_name: str, like: Tensor, options: PolicyOptions) -> None:
        """Raise on inputs that do not fit together, or do not fit `like`, which has one entry per token."""
        checks.tensor("advantages", self.advantages)
        checks.tensor("mask", self.mask)
        checks.mask(self.mask, like_name, like)
        if options.kl_in_loss and self.ref_logprobs is None:
            raise ValueError(
                f"ref_logprobs is None, expected a tensor like {like_name} because kl_coef is {options.kl_coef!r}"
            )
        for name, value in zip(self._fields, self, strict=True):
            if name != "mask" and value is not None:
                checks.alike(name, value, like_name, like)
                checks.no_nan(name, value, self.mask)

    def dtype_with(self, *others: Tensor | None) -> torch.dtype:
        """The result's dtype, from these and the loss's other inputs."""
        return dtype_of(self.old_logprobs, self.advantages, self.ref_logprobs, self.weights, *others)

    def detached(self) -> PolicyTokens:
        """The same tensors, detached: they are constants of the loss."""
        return self._map(lambda x: x.detach(), self.mask.detach())

    def select_valid(self, rows: Rows) -> PolicyTokens:
        """The valid tokens, flat."""
        return self._map(rows.select_valid, torch.ones(rows.count, dtype=torch.bool, device=self.mask.device))

    def part(self, piece: slice) -> PolicyTokens:
        return self._map(lambda x: x[piece], self.mask[piece])

    def _map(self, change: Callable[[Tensor], Tensor], mask: Tensor) -> PolicyTokens:
        given = (self.old_logprobs, self.ref_logprobs, self.weights)
        old, ref, weights = (None if x is None else change(x) for x in given)
        return PolicyTokens(old, change(self.advantages), mask, ref, weights)


class PolicyTerms(NamedTuple):
    """The sums (`SUMS`), and per token the derivatives of the loss by logprobs and by entropy.

    Derivatives that were not requested are empty.
    """

    totals: Tensor
    grad: Tensor
    entropy_grad: Tensor


def dtype_of(*given: Tensor | None) -> torch.dtype:
    """The result's dtype; absent inputs are None."""
    return result_dtype(*(x.dtype for x in given if x is not None))


def policy_options(*given: Any) -> PolicyOptions:
    """Check the options, and convert NumPy numbers to Python numbers."""
    options = PolicyOptions(*map(checks.python_number, given))
    options.check()
    return options


def divisor_arguments(normalizer: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """The normalizer as the operators take it: a tensor, or a number."""
    if isinstance(normalizer, Tensor):
        return normalizer.detach(), None
    return None, None if normalizer is None else float(normalizer)


def metrics_of(totals: Tensor, *, entropy: bool, kl: bool) -> dict[str, Tensor]:
    """The metrics whose inputs were given. `totals`: all sums but the loss, divided."""
    absent = {"tokens", *(() if entropy else ("policy/entropy",)), *(() if kl else ("policy/kl",))}
    return {name: x for name, x in zip(SUMS[1:], totals.unbind(), strict=True) if name not in absent}
