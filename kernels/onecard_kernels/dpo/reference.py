"""Preference losses on sequence log-probabilities: a table of losses over a table of divergences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..kl.reference import log_ratio
from ..records import Loss, divisor_of

EXPONENT_LIMIT = 80.0  # e^80 is 6e34, just inside fp32; the gradient is zero above


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Loss:
    """Preference loss of B pairs, from the log-probabilities of whole responses.

    r = logp - ref_logp;  s = f'(e^r) (reverse_kl: s = r);  delta = s_chosen - s_rejected
    loss = sum_pairs weight * sum_types loss_weight * l_type(delta) / normalizer

    sigmoid   -(1 - e) logsigmoid(beta delta) - e logsigmoid(-beta delta), e = label_smoothing
              (DPO, https://arxiv.org/abs/2305.18290; e > 0 is its conservative form, cDPO,
              https://ericmitchell.ai/cdpo.pdf). TRL 1.16's `sigmoid` ignores label_smoothing: equal at e = 0 only.
    ipo       (delta' - 1 / (2 beta))^2, delta' of scores divided by their lengths where lengths are given, as TRL
              always does (https://arxiv.org/abs/2310.12036)
    hinge     max(0, 1 - beta delta) (SLiC, https://arxiv.org/abs/2305.10425)
    discopop  l = beta delta, m = sigmoid(l / discopop_tau): -(1 - m) logsigmoid(l) + m exp(-l)
              (https://arxiv.org/abs/2406.08414)

    Divergences, https://arxiv.org/abs/2309.16240: reverse_kl s = r; forward_kl s = 1 - e^-r;
    js_divergence s = log 2 + logsigmoid(r); alpha_divergence s = (e^((a - 1) r) - 1) / (a - 1), a = 1 being r.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed over the response, in nats.
        beta: strength of the pull towards the reference, above 0.
        loss_type: one name or several; with several their losses add up.
        loss_weights: one factor per loss type, 1 each by default.
        label_smoothing: share of pairs whose preference is taken to be flipped, 0 to 0.5; used by sigmoid.
        f_divergence_type: see above. Exponents are clamped at 80, with zero gradient above.
        f_alpha_divergence_coef: a.
        discopop_tau: temperature of discopop's mixture.
        chosen_lengths, rejected_lengths: `[B]`, response tokens; both or neither; below 1 counts as 1. Used by ipo.
        weights: `[B]`, a factor for each pair's loss (not for the metrics).
        normalizer: divides the sums of loss and metrics, B by default. Given the whole batch's number of pairs,
            micro-batches add up to the batch in loss, gradient and metrics.

    Returns:
        Loss, fp32 (fp64 in, fp64 out), with the metrics rewards/chosen and rewards/rejected (beta r), rewards/margins
        (their difference) and rewards/accuracies (share of pairs with chosen above rejected).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    factors = (1.0,) * len(types) if loss_weights is None else tuple(loss_weights)
    _check_options(types, factors, beta, label_smoothing, f_divergence_type, f_alpha_divergence_coef, discopop_tau)
    _check_pairs(
        {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
        },
        {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths},
        weights,
    )
    checks.normalizer(normalizer)

    chosen_ratio = log_ratio(chosen_logps, ref_chosen_logps)
    rejected_ratio = log_ratio(rejected_logps, ref_rejected_logps)
    divisor = divisor_of(normalizer, float(max(chosen_logps.shape[0], 1)), chosen_ratio.dtype)
    score = DIVERGENCES[f_divergence_type]
    pairs = Pairs(
        score(chosen_ratio, f_alpha_divergence_coef),
        score(rejected_ratio, f_alpha_divergence_coef),
        chosen_lengths,
        rejected_lengths,
        beta,
        label_smoothing,
        discopop_tau,
    )
    losses = torch.stack([factor * LOSSES[name](pairs) for name, factor in zip(types, factors, strict=True)]).sum(0)
    if weights is not None:
        losses = losses * weights
    return Loss(losses.sum() / divisor, _rewards(beta * chosen_ratio.detach(), beta * rejected_ratio.detach(), divisor))


class Pairs(NamedTuple):
    """What a loss type sees: scores and lengths per pair, and the numbers."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def logits(self) -> Tensor:
        return self.beta * (self.chosen - self.rejected)


def _sigmoid(pairs: Pairs) -> Tensor:
    e = pairs.label_smoothing
    kept = -F.logsigmoid(pairs.logits)
    return kept if e == 0.0 else (1.0 - e) * kept - e * F.logsigmoid(-pairs.logits)


def _ipo(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.chosen, pairs.rejected
    if pairs.chosen_lengths is not None and pairs.rejected_lengths is not None:
        chosen = chosen / pairs.chosen_lengths.clamp(min=1)
        rejected = rejected / pairs.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 0.5 / pairs.beta).square()


def _hinge(pairs: Pairs) -> Tensor:
    return torch.relu(1.0 - pairs.logits)


def _discopop(pairs: Pairs) -> Tensor:
    modulation = torch.sigmoid(pairs.logits / pairs.discopop_tau)
    return -F.logsigmoid(pairs.logits) * (1.0 - modulation) + _exp(-pairs.logits) * modulation


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "discopop": _discopop,
}


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


def _exp(x: Tensor) -> Tensor:
    return x.clamp(max=EXPONENT_LIMIT).exp()


def _expm1(x: Tensor) -> Tensor:
    return x.clamp(max=EXPONENT_LIMIT).expm1()


def _rewards(chosen: Tensor, rejected: Tensor, divisor: float | Tensor) -> dict[str, Tensor]:
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }
    return {name: value.sum() / divisor for name, value in per_pair.items()}


def _check_options(
    types: tuple[str, ...],
    factors: tuple[float, ...],
    beta: float,
    label_smoothing: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    discopop_tau: float,
) -> None:
    if not types:
        raise ValueError("loss_type is empty, expected at least one of " + ", ".join(map(repr, LOSSES)))
    for name in types:
        checks.one_of("loss_type", name, LOSSES)
    if len(factors) != len(types):
        raise ValueError(f"loss_weights is {factors!r}, expected {len(types)} numbers, one per loss_type {types!r}")
    for factor in factors:
        checks.finite("loss_weights", factor)
    checks.positive("beta", beta)
    checks.within("label_smoothing", label_smoothing, 0.0, 0.5)
    checks.one_of("f_divergence_type", f_divergence_type, DIVERGENCES)
    checks.finite("f_alpha_divergence_coef", f_alpha_divergence_coef)
    checks.positive("discopop_tau", discopop_tau)


def _check_pairs(logps: dict[str, Tensor], lengths: dict[str, Tensor | None], weights: Tensor | None) -> None:
    like_name, like = next(iter(logps.items()))
    checks.floating(like_name, like)
    if like.dim() != 1:
        raise ValueError(f"{like_name} has shape {tuple(like.shape)}, expected [B], one value per pair")
    for name, value in logps.items():
        checks.floating(name, value)
        _check_like(name, value, like)
        checks.no_nan(name, value)
    given = {name: value for name, value in lengths.items() if value is not None}
    for name, value in given.items():
        checks.tensor(name, value)
        _check_like(name, value, like)
    if len(given) == 1:
        missing = next(name for name, value in lengths.items() if value is None)
        raise ValueError(f"{missing} is None, expected both chosen_lengths and rejected_lengths, or neither")
    if weights is not None:
        checks.floating("weights", weights)
        _check_like("weights", weights, like)
        checks.no_nan("weights", weights)


def _check_like(name: str, value: Tensor, like: Tensor) -> None:
    checks.shape(name, value, like.shape, "the shape of chosen_logps")
    checks.device(name, value, "chosen_logps", like)
