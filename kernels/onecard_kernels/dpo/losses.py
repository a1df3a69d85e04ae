"""The tables of preference losses and of f-divergences. `dpo_loss` states their equations and papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import difference

EXPONENT_LIMIT = 40.0  # e^40 is 2e17, whose square (ipo) fits into fp32. Above, the gradient is zero.


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


@dataclass(frozen=True)
class Pairs:
    """Inputs of a loss for B pairs, in one dtype: log-probabilities, log-ratios, scores, lengths, and options."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def logits(self) -> Tensor:
        return self.beta * difference(self.chosen_score, self.rejected_score)

    @property
    def mean_delta(self) -> Tensor:
        """The difference of the scores per token, or of the whole scores where no lengths are given."""
        return difference(
            per_token(self.chosen_score, self.chosen_lengths), per_token(self.rejected_score, self.rejected_lengths)
        )


def per_token(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Sums over responses divided by their lengths; an empty response counts as one token."""
    return values if lengths is None else values / lengths.to(values.dtype).clamp(min=1)


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) logsigmoid(x) - e logsigmoid(-x): the logistic loss if a share e of the labels is flipped."""
    unflipped = -F.logsigmoid(logits)
    if label_smoothing == 0.0:
        return unflipped
    return (1.0 - label_smoothing) * unflipped - label_smoothing * F.logsigmoid(-logits)


def _sigmoid(pairs: Pairs) -> Tensor:
    return smoothed_logistic(pairs.logits, pairs.label_smoothing)


def _ipo(pairs: Pairs) -> Tensor:
    return (pairs.mean_delta - 0.5 / pairs.beta).square()


def _hinge(pairs: Pairs) -> Tensor:
    return torch.relu(1.0 - pairs.logits)


def _discopop(pairs: Pairs) -> Tensor:
    logits, sharp = pairs.logits, pairs.logits / pairs.discopop_tau
    # m exp(-l) as one exponential: as a product it would be 0 * inf where l is far below 0.
    exponential = (F.logsigmoid(sharp) - logits).clamp(max=EXPONENT_LIMIT).exp()
    return torch.sigmoid(-sharp) * -F.logsigmoid(logits) + exponential


def _robust(pairs: Pairs) -> Tensor:
    e = pairs.label_smoothing
    unflipped, flipped = -F.logsigmoid(pairs.logits), -F.logsigmoid(-pairs.logits)
    return ((1.0 - e) * unflipped - e * flipped) / (1.0 - 2.0 * e)


def _exo_pair(pairs: Pairs) -> Tensor:
    e, logits = pairs.label_smoothing, pairs.logits
    unflipped = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-e))
    return unflipped + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(e))


def _nca_pair(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.beta * pairs.chosen_ratio, pairs.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(pairs: Pairs) -> Tensor:
    return -F.logsigmoid(pairs.beta * pairs.chosen_ratio) - F.logsigmoid(-pairs.beta * pairs.rejected_ratio)


def _sppo_hard(pairs: Pairs) -> Tensor:
    target = 0.5 / pairs.beta
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


def _aot(pairs: Pairs) -> Tensor:
    policy = _sorted(difference(pairs.chosen_logps, pairs.rejected_logps))
    reference = _sorted(difference(pairs.ref_chosen_logps, pairs.ref_rejected_logps))
    return smoothed_logistic(pairs.beta * difference(policy, reference), pairs.label_smoothing)


def _aot_unpaired(pairs: Pairs) -> Tensor:
    delta = difference(_sorted(pairs.chosen_ratio), _sorted(pairs.rejected_ratio))
    return smoothed_logistic(pairs.beta * delta, pairs.label_smoothing)


def _sorted(values: Tensor) -> Tensor:
    # With a stable sort, equal values get the same gradients on every run.
    return values.sort(dim=0, stable=True).values


def _apo_zero(pairs: Pairs) -> Tensor:
    # sigmoid(-x) where the paper has 1 - sigmoid(x), which would lose small values to rounding.
    return torch.sigmoid(-pairs.beta * pairs.chosen_ratio) + torch.sigmoid(pairs.beta * pairs.rejected_ratio)


def _apo_down(pairs: Pairs) -> Tensor:
    delta = difference(pairs.chosen_ratio, pairs.rejected_ratio)
    return torch.sigmoid(pairs.beta * pairs.chosen_ratio) + torch.sigmoid(-pairs.beta * delta)


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    return smoothed_logistic(pairs.beta * pairs.mean_delta, pairs.label_smoothing)


def _sft(pairs: Pairs) -> Tensor:
    return -per_token(pairs.chosen_logps, pairs.chosen_lengths)


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "discopop": _discopop,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sigmoid_norm": _sigmoid_norm,
    "sft": _sft,
}

# Losses that sort the whole batch: weights have no meaning, and micro-batches do not add up to the batch.
WHOLE_BATCH = frozenset({"aot", "aot_unpaired"})

# Losses that depend only on the difference of scores. A score has an unknown term of its prompt, which cancels there.
ANY_DIVERGENCE = frozenset({"sigmoid", "ipo", "hinge", "discopop", "robust", "exo_pair", "sigmoid_norm", "sft"})
