"""How far the policy is from the reference: the score of a log-ratio under each f-divergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

EXPONENT_LIMIT = 40.0  # e^40 is 2e17: its square, which ipo takes, is inside fp32 too. The gradient is zero above.


def _reverse_kl(ratio: Tensor, alpha: float) -> Tensor:
    return ratio


def _forward_kl(ratio: Tensor, alpha: float) -> Tensor:
    return -_expm1(-ratio)


def _js_divergence(ratio: Tensor, alpha: float) -> Tensor:
    return math.log(2.0) + F.logsigmoid(ratio)


def _alpha_divergence(ratio: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1.0) < 1e-6:  # the limit; TRL's threshold
        return ratio
    return _expm1((alpha - 1.0) * ratio) / (alpha - 1.0)


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


def _expm1(x: Tensor) -> Tensor:
    return x.clamp(max=EXPONENT_LIMIT).expm1()
