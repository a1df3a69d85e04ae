"""Preference losses that need no reference model: SimPO, ORPO, CPO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..records import Loss, divisor_of, result_dtype
from .dpo import dpo_loss
from .inputs import check_lengths, check_responses, check_weights, difference, reward_metrics
from .losses import per_token, smoothed_logistic

CPO_LOSSES = ("sigmoid", "hinge", "ipo")


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Loss:
    """SimPO loss of B pairs: the reward is the mean log-probability per token, with a target margin between the two.

    x = beta (logp_chosen / length_chosen - logp_rejected / length_rejected) - gamma;  e = label_smoothing
    loss = sum_pairs weight * (-(1 - e) logsigmoid(x) - e logsigmoid(-x)) / normalizer

    "SimPO: Simple Preference Optimization with a Reference-Free Reward", https://arxiv.org/abs/2405.14734. In TRL
    it is CPO's loss_type `simpo`, and gamma is `simpo_gamma`; the defaults there are beta 0.1 and gamma 0.5.

    Args:
        chosen_logps, rejected_logps: `[B]`, summed over the response, in nats.
        chosen_lengths, rejected_lengths: `[B]`, response tokens; below 1 counts as 1.
        beta: scale of the reward, above 0; 2 to 10 in the paper.
        gamma: margin, 0 or more, in units of the reward; the authors' gamma / beta is 0.1 to 0.8.
        label_smoothing: assumed share of pairs with a flipped preference, 0 to 0.5.
        weights: `[B]`, a factor for each pair's loss (not for the metrics).
        normalizer: divides the sums of loss and metrics, B by default; see `dpo_loss`.

    Returns:
        Loss, fp32 (fp64 in, fp64 out), with rewards/chosen and rewards/rejected (beta logp / length), rewards/margins
        and rewards/accuracies. `-inf - -inf` counts as 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    beta, gamma, label_smoothing = map(checks.python_number, (beta, gamma, label_smoothing))
    checks.positive("beta", beta)
    checks.at_least("gamma", gamma, 0.0)
    checks.within("label_smoothing", label_smoothing, 0.0, 0.5)
    checks.constants("simpo_loss", weights=weights, normalizer=normalizer)
    normalizer = checks.normalizer(normalizer)
    chosen, rejected = _mean_logps(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, weights)
    losses = smoothed_logistic(beta * difference(chosen, rejected) - gamma, label_smoothing)
    return _reduce(losses, {}, beta, chosen, rejected, weights, normalizer)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Loss:
    """ORPO loss of B pairs: the likelihood of the chosen response, and its odds over the rejected one's.

    m = logp / length;  log_odds(m) = m - log(1 - e^m);  x = log_odds(m_chosen) - log_odds(m_rejected)
    loss = sum_pairs weight * (-m_chosen - beta logsigmoid(x)) / normalizer

    "ORPO: Monolithic Preference Optimization without Reference Model", https://arxiv.org/abs/2403.07691. TRL's first
    term is the mean over all tokens of the batch, prompts too; here it is a mean over pairs of means over responses.

    Args:
        chosen_logps, rejected_logps: `[B]`, summed over the response, in nats.
        chosen_lengths, rejected_lengths: `[B]`, response tokens; below 1 counts as 1.
        beta: weight of the odds (the paper's lambda), above 0.
        weights: `[B]`, a factor for each pair's loss (not for the metrics).
        normalizer: divides the sums of loss and metrics, B by default; see `dpo_loss`.

    Returns:
        Loss, fp32 (fp64 in, fp64 out), with rewards/chosen and rewards/rejected (beta m), rewards/margins,
        rewards/accuracies, nll_loss (-m_chosen), log_odds_chosen (x) and log_odds_ratio (logsigmoid(x)). For the
        odds, m is clamped at -eps of its dtype: at m = 0 they are infinite. `-inf - -inf` counts as 0 in x.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    beta = checks.python_number(beta)
    checks.positive("beta", beta)
    checks.constants("orpo_loss", weights=weights, normalizer=normalizer)
    normalizer = checks.normalizer(normalizer)
    chosen, rejected = _mean_logps(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, weights)
    log_odds = difference(_log_odds(chosen), _log_odds(rejected))
    ratio = F.logsigmoid(log_odds)
    extra = {"nll_loss": -chosen, "log_odds_chosen": log_odds, "log_odds_ratio": ratio}
    return _reduce(-chosen - beta * ratio, extra, beta, chosen, rejected, weights, normalizer)


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Loss:
    """CPO loss of B pairs: a DPO loss with a uniform reference, and the likelihood of the chosen response.

    loss = sum_pairs weight * (loss_type - cpo_alpha logp_chosen / length_chosen) / normalizer; without lengths,
    length_chosen is 1

    loss_type is `dpo_loss`'s sigmoid, hinge or ipo with s = logp. "Contrastive Preference Optimization",
    https://arxiv.org/abs/2401.08417. TRL's second term is the mean over all tokens of the batch; here it is a mean over
    pairs of means over responses. TRL's loss_type `simpo` is `simpo_loss`.

    Args:
        chosen_logps, rejected_logps: `[B]`, summed over the response, in nats.
        beta: scale of the preference, above 0.
        loss_type: "sigmoid", "hinge" or "ipo".
        cpo_alpha: weight of the likelihood, 0 or more.
        label_smoothing: assumed share of pairs with a flipped preference, 0 to 0.5; used by sigmoid.
        chosen_lengths, rejected_lengths: `[B]`, response tokens; both or neither; below 1 counts as 1. Used by the
            likelihood and by ipo.
        weights: `[B]`, a factor for each pair's loss (not for the metrics).
        normalizer: divides the sums of loss and metrics, B by default; see `dpo_loss`.

    Returns:
        Loss, fp32 (fp64 in, fp64 out), with rewards/chosen and rewards/rejected (beta logp), rewards/margins,
        rewards/accuracies and nll_loss (-logp_chosen / length_chosen). `-inf - -inf` counts as 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    beta, cpo_alpha, label_smoothing = map(checks.python_number, (beta, cpo_alpha, label_smoothing))
    checks.one_of("loss_type", loss_type, CPO_LOSSES)
    checks.constants("cpo_loss", weights=weights, normalizer=normalizer)
    normalizer = checks.normalizer(normalizer)
    checks.at_least("cpo_alpha", cpo_alpha, 0.0)
    check_responses({"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}, "pair")
    # Without the likelihood at cpo_alpha = 0, where 0 * -inf would be NaN.
    types, factors = ((loss_type, "sft"), (1.0, cpo_alpha)) if cpo_alpha else ((loss_type,), (1.0,))
    uniform = torch.zeros_like(chosen_logps)
    loss, metrics = dpo_loss(
        chosen_logps,
        rejected_logps,
        uniform,
        uniform,
        beta=beta,
        loss_type=types,
        loss_weights=factors,
        label_smoothing=label_smoothing,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=weights,
        normalizer=normalizer,
    )
    nll = -per_token(chosen_logps.detach().to(loss.dtype), chosen_lengths)
    divisor = divisor_of(normalizer, float(max(nll.shape[0], 1)), nll.dtype)
    return Loss(loss, {**metrics, "nll_loss": nll.sum() / divisor})


def _mean_logps(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check the inputs; returns log-probabilities per token, in the result's dtype."""
    check_responses({"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}, "pair")
    checks.tensor("chosen_lengths", chosen_lengths)
    checks.tensor("rejected_lengths", rejected_lengths)
    check_lengths(chosen_lengths, rejected_lengths, "chosen_logps", chosen_logps)
    check_weights(weights, None, "chosen_logps", chosen_logps)
    dtype = result_dtype(chosen_logps.dtype, rejected_logps.dtype)
    return per_token(chosen_logps.to(dtype), chosen_lengths), per_token(rejected_logps.to(dtype), rejected_lengths)


def _reduce(
    losses: Tensor,
    extra: dict[str, Tensor],
    beta: float,
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor | None,
    normalizer: float | Tensor | None,
) -> Loss:
    """Weighted losses and metrics of pairs, summed and divided. `extra`: more metrics, by name, per pair."""
    divisor = divisor_of(normalizer, float(max(losses.shape[0], 1)), losses.dtype)
    metrics = reward_metrics(beta * chosen.detach(), beta * rejected.detach(), divisor)
    metrics.update({name: value.detach().sum() / divisor for name, value in extra.items()})
    if weights is not None:
        losses = losses * weights.detach().to(losses.dtype)
    return Loss(losses.sum() / divisor, metrics)


def _log_odds(mean_logps: Tensor) -> Tensor:
    bounded = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return bounded - torch.log(-torch.expm1(bounded))
