"""dpo_loss: the DPO family, one loss or several, on sequence log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .. import checks
from ..kl.token_kl import log_ratio
from ..records import Loss, divisor_of, result_dtype
from .inputs import check_lengths, check_responses, check_weights, reward_metrics
from .losses import ANY_DIVERGENCE, DIVERGENCES, LOSSES, WHOLE_BATCH, Pairs

T = TypeVar("T")


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

    r = logp - ref_logp;  s = f'(e^r) (reverse_kl: s = r);  l = beta (s_chosen - s_rejected);  e = label_smoothing
    S(x) = -(1 - e) logsigmoid(x) - e logsigmoid(-x);  c = beta r_chosen;  j = beta r_rejected
    loss = sum_pairs weight * sum_types loss_weight * loss_type / normalizer

    sigmoid       S(l): DPO, https://arxiv.org/abs/2305.18290; with e > 0 cDPO, https://ericmitchell.ai/cdpo.pdf
    ipo           (d - 1 / (2 beta))^2, d = s_chosen / length_chosen - s_rejected / length_rejected, or s_chosen -
                  s_rejected without lengths: https://arxiv.org/abs/2310.12036 (TRL: its authors divide by lengths)
    hinge         max(0, 1 - l): SLiC, https://arxiv.org/abs/2305.10425
    discopop      -(1 - m) logsigmoid(l) + m exp(-l), m = sigmoid(l / discopop_tau): https://arxiv.org/abs/2406.08414
    robust        (-(1 - e) logsigmoid(l) + e logsigmoid(-l)) / (1 - 2e), e below 0.5: https://arxiv.org/abs/2403.00409
    exo_pair      q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = sigmoid(l), e above 0 (the paper's 1e-3):
                  https://arxiv.org/abs/2402.00856
    nca_pair      -logsigmoid(c) - 0.5 logsigmoid(-c) - 0.5 logsigmoid(-j): https://arxiv.org/abs/2402.05369
    bco_pair      -logsigmoid(c) - logsigmoid(-j): https://arxiv.org/abs/2404.04656 without its running mean of rewards
    sppo_hard     (r_chosen - 1 / (2 beta))^2 + (r_rejected + 1 / (2 beta))^2: https://arxiv.org/abs/2405.00675
    aot           S(beta (sorted(logp_chosen - logp_rejected) - sorted(ref_chosen - ref_rejected))), sorted over the
                  batch: https://arxiv.org/abs/2406.05882
    aot_unpaired  S(beta (sorted(r_chosen) - sorted(r_rejected))): the same paper
    apo_zero      sigmoid(-c) + sigmoid(j): https://arxiv.org/abs/2408.06266
    apo_down      sigmoid(c) + sigmoid(j - c): the same paper
    sigmoid_norm  S(beta d), d as in ipo: length-normalised DPO, https://arxiv.org/abs/2411.15124
    sft           -logp_chosen / length_chosen, or -logp_chosen without lengths: MPO, https://arxiv.org/abs/2411.10442

    Divergences, https://arxiv.org/abs/2309.16240: reverse_kl s = r; forward_kl s = 1 - e^-r;
    js_divergence s = log 2 + logsigmoid(r); alpha_divergence s = (e^((a - 1) r) - 1) / (a - 1), a = 1 being r.
    nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero and apo_down are defined for reverse_kl only.

    Names and values are TRL 1.16's, except: sigmoid and sigmoid_norm use e (TRL ignores it); sft is a mean
    over pairs of means over tokens (TRL: a mean over all tokens, so micro-batches would not add up); exponents of
    divergences are clamped at 40 with zero gradient above (TRL: those of alpha_divergence, at 80); ipo and sigmoid_norm
    can be computed without lengths.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed over the response, in nats.
            The reference's and `weights` are constants.
        beta: above 0; a larger beta keeps the policy closer to the reference.
        loss_type: one name or several, whose losses are added.
        loss_weights: one factor per loss type, 1 each by default.
        label_smoothing: e, the assumed share of pairs with a flipped preference, 0 to 0.5; used by sigmoid,
            sigmoid_norm, robust, exo_pair, aot and aot_unpaired.
        f_divergence_type: see above.
        f_alpha_divergence_coef: a.
        discopop_tau: temperature of discopop's mixture, above 0.
        chosen_lengths, rejected_lengths: `[B]`, response tokens; both or neither; below 1 counts as 1. Used by ipo,
            sigmoid_norm and sft.
        weights: `[B]`, a factor for each pair's loss (not for the metrics); not for aot and aot_unpaired, which sort
            the batch. WPO (https://arxiv.org/abs/2406.11827; TRL's `use_weighting`):
            exp(m_chosen + m_rejected), detached, m = sum_t (logp_t - log_sum_sq_probs_t) / length, with logp_t and
            log_sum_sq_probs_t as `linear_logprobs` returns them and the sums as `sequence_sums` takes them.
        normalizer: divides the sums of loss and metrics, B by default. With the number of pairs of a whole batch,
            losses, gradients and metrics of its micro-batches add up to those of the batch. Not for aot and
            aot_unpaired, which sort the batch.

    Returns:
        Loss, fp32 (fp64 in, fp64 out), with the metrics rewards/chosen and rewards/rejected (beta r), rewards/margins
        (their difference) and rewards/accuracies (share of pairs with chosen above rejected). `-inf - -inf` is 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    numbers = (beta, label_smoothing, f_alpha_divergence_coef, discopop_tau)
    beta, label_smoothing, f_alpha_divergence_coef, discopop_tau = map(checks.python_number, numbers)
    types, factors = check_options(
        loss_type,
        loss_weights,
        beta,
        label_smoothing,
        f_divergence_type,
        f_alpha_divergence_coef,
        discopop_tau,
        weights,
        normalizer,
    )
    logps = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    check_responses(logps, "pair")
    check_lengths(chosen_lengths, rejected_lengths, "chosen_logps", chosen_logps)
    normalizer = check_weights(weights, normalizer, "chosen_logps", chosen_logps)
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    checks.constants("dpo_loss", **references, weights=weights, normalizer=normalizer)

    dtype = result_dtype(*(value.dtype for value in logps.values()))
    # The reference is a constant of the loss, even if it has a graph.
    logps = {name: (x.detach() if name.startswith("ref_") else x).to(dtype) for name, x in logps.items()}
    chosen_ratio = log_ratio(logps["chosen_logps"], logps["ref_chosen_logps"])
    rejected_ratio = log_ratio(logps["rejected_logps"], logps["ref_rejected_logps"])
    score = DIVERGENCES[f_divergence_type]
    pairs = Pairs(
        **logps,
        chosen_ratio=chosen_ratio,
        rejected_ratio=rejected_ratio,
        chosen_score=score(chosen_ratio, f_alpha_divergence_coef),
        rejected_score=score(rejected_ratio, f_alpha_divergence_coef),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
    )
    losses = torch.stack([factor * LOSSES[name](pairs) for name, factor in zip(types, factors, strict=True)]).sum(0)
    if weights is not None:
        losses = losses * weights.detach().to(dtype)
    divisor = divisor_of(normalizer, float(max(chosen_logps.shape[0], 1)), dtype)
    rewards = reward_metrics(beta * chosen_ratio.detach(), beta * rejected_ratio.detach(), divisor)
    return Loss(losses.sum() / divisor, rewards)


def check_options(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    beta: float,
    label_smoothing: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    discopop_tau: float,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Check the options, and that they can be combined. Returns the loss types and their factors."""
    types = (loss_type,) if isinstance(loss_type, str) else _as_tuple("loss_type", loss_type, "a name or several")
    factors = (1.0,) * len(types)
    if loss_weights is not None:
        factors = tuple(map(checks.python_number, _as_tuple("loss_weights", loss_weights, "several numbers")))
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
    for name in types:
        _check_combination(name, label_smoothing, f_divergence_type, weights, normalizer)
    return types, factors


def _check_combination(
    loss_type: str, label_smoothing: float, f_divergence_type: str, weights: Tensor | None, normalizer: object
) -> None:
    """Raise if an option cannot be combined with this loss."""
    if loss_type == "exo_pair" and label_smoothing == 0.0:
        raise ValueError(
            f"label_smoothing is {label_smoothing!r}, expected above 0 with loss_type 'exo_pair' (1e-3 in the paper)"
        )
    if loss_type == "robust" and label_smoothing == 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing!r}, expected below 0.5 with loss_type 'robust'")
    if loss_type not in ANY_DIVERGENCE and f_divergence_type != "reverse_kl":
        raise ValueError(
            f"f_divergence_type is {f_divergence_type!r}, expected 'reverse_kl' with loss_type {loss_type!r}, "
            "which depends on more than the difference of scores"
        )
    if loss_type in WHOLE_BATCH and normalizer is not None:
        raise ValueError(
            f"normalizer is {normalizer!r}, expected None with loss_type {loss_type!r}, "
            "which sorts the whole batch: micro-batches do not add up to it"
        )
    if loss_type in WHOLE_BATCH and weights is not None:
        raise ValueError(
            f"weights is a {type(weights).__name__}, expected None with loss_type {loss_type!r}, "
            "which sorts the batch: a sorted value belongs to no single pair"
        )


def _as_tuple(name: str, value: Sequence[T], expected: str) -> tuple[T, ...]:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r}, expected {expected}")
    return tuple(value)
