"""kto_loss: a preference loss of single responses, each desirable or not."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..kl.token_kl import log_ratio
from ..records import Loss, divisor_of
from .inputs import check_responses, check_weights


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Loss:
    """KTO loss of B unpaired responses.

    r = logp - ref_logp;  z = max(kl, 0)
    desirable: desirable_weight * sigmoid(beta (z - r));  undesirable: undesirable_weight * sigmoid(beta (r - z))
    loss = sum_responses weight * of the above / normalizer

    "KTO: Model Alignment as Prospect Theoretic Optimization", https://arxiv.org/abs/2402.01306. With kl = 0 it is TRL's
    `apo_zero_unpaired` (APO, https://arxiv.org/abs/2408.06266).

    Args:
        logps, ref_logps: `[B]`, summed over the response, in nats.
        desirable: `[B]`, bool or 0/1.
        kl: 0-d or `[1]`, an estimate of KL(pi || ref) in nats: the mean of logp - ref_logp over mismatched pairs, in
            which a response follows another example's prompt; the same for all micro-batches of a batch. It gets no
            gradient.
        beta: above 0; a larger beta keeps the policy closer to the reference.
        desirable_weight, undesirable_weight: 0 or more. In the paper, (desirable_weight * number of desirable
            responses) / (undesirable_weight * number of undesirable ones) is from 1 to 4/3.
        weights: `[B]`, a factor for each response's loss (not for the metrics).
        normalizer: divides the sums of loss and metrics, B by default. With the number of responses of a whole
            batch, losses, gradients and metrics of its micro-batches add up to those of the batch.

    Returns:
        Loss, fp32 (fp64 in, fp64 out). `-inf - -inf` counts as r = 0. The metrics are sums divided by the normalizer:
        rewards/chosen_sum and count/chosen (beta r and number of the desirable), rewards/rejected_sum and
        count/rejected (of the undesirable), and kl (B times z). TRL's rewards/chosen is rewards/chosen_sum /
        count/chosen.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    numbers = (beta, desirable_weight, undesirable_weight)
    beta, desirable_weight, undesirable_weight = map(checks.python_number, numbers)
    checks.positive("beta", beta)
    checks.at_least("desirable_weight", desirable_weight, 0.0)
    checks.at_least("undesirable_weight", undesirable_weight, 0.0)
    check_responses({"logps": logps, "ref_logps": ref_logps}, "response")
    _check_labels(desirable, kl, logps)
    normalizer = check_weights(weights, normalizer, "logps", logps)
    checks.constants("kto_loss", ref_logps=ref_logps, kl=kl, weights=weights, normalizer=normalizer)

    desirable, kl = desirable.bool(), kl.reshape(())
    ratio = log_ratio(logps, ref_logps.detach())
    z = kl.detach().to(ratio.dtype).clamp(min=0)
    # sigmoid(-x) instead of 1 - sigmoid(x), which would round small values to 0.
    losses = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(beta * (z - ratio)),
        undesirable_weight * torch.sigmoid(beta * (ratio - z)),
    )
    if weights is not None:
        losses = losses * weights.detach().to(ratio.dtype)
    divisor = divisor_of(normalizer, float(max(logps.shape[0], 1)), ratio.dtype)
    rewards, zero = beta * ratio.detach(), torch.zeros_like(ratio)
    per_response = {
        "rewards/chosen_sum": torch.where(desirable, rewards, zero),
        "rewards/rejected_sum": torch.where(desirable, zero, rewards),
        "count/chosen": desirable.to(ratio.dtype),
        "count/rejected": (~desirable).to(ratio.dtype),
        "kl": z.expand_as(ratio),
    }
    return Loss(losses.sum() / divisor, {name: value.sum() / divisor for name, value in per_response.items()})


def _check_labels(desirable: Tensor, kl: Tensor, logps: Tensor) -> None:
    checks.tensor("desirable", desirable)
    if desirable.dtype not in (torch.bool, *checks.INTEGERS):
        raise TypeError(f"desirable has dtype {desirable.dtype}, expected torch.bool, or integers that are 0 or 1")
    checks.shape("desirable", desirable, logps.shape, "the shape of logps")
    checks.device("desirable", desirable, "logps", logps)
    if desirable.dtype != torch.bool and checks.values_are_checked(desirable.device):
        odd = desirable[(desirable != 0) & (desirable != 1)]
        if odd.numel():
            raise ValueError(f"desirable holds {odd[0].item()}, expected only 0 and 1")
    checks.floating("kl", kl)
    if tuple(kl.shape) not in ((), (1,)):
        raise ValueError(f"kl has shape {tuple(kl.shape)}, expected () or (1,), one estimate for all responses")
    checks.device("kl", kl, "logps", logps)
    if checks.values_are_checked(kl.device):
        checks.finite("kl", kl.item())
