"""Losses of a batch: pairs with a reference, pairs without one, and labelled responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onecard.data.batches import LabelledBatch, PreferenceBatch, ResponseTargets, TokenBatch, slice_sequences
from onecard.models.head import LanguageHead
from onecard.models.roles import Roles
from onecard_kernels import Loss, dpo_loss, kto_loss, linear_dpo_loss, linear_logprobs, sequence_sums
from onecard_kernels.dpo import WHOLE_BATCH

Keywords = dict[str, Any]  # keyword arguments of a loss in onecard_kernels, with the settings as values


def sequence_logps(roles: Roles, sequences: TokenBatch) -> Tensor:
    """Log-probs of whole responses [S], in nats, under the current role."""
    targets = sequences.targets
    return sequence_sums(roles.logprobs(sequences, targets), targets.sequence_ids, len(sequences.lengths))


@torch.no_grad()
def reference_logps(roles: Roles, sequences: TokenBatch) -> Tensor:
    """Log-probs of whole responses [S] under the reference."""
    with roles.active("reference"):
        return sequence_logps(roles, sequences)


def pair_ref_logps(roles: Roles, batch: PreferenceBatch) -> Tensor:
    """Log-probs of a batch of pairs under the reference: `PreferenceBatch.ref_logps` [2B]."""
    return reference_logps(roles, batch.sequences)


def labelled_parts(batch: LabelledBatch) -> tuple[TokenBatch, TokenBatch]:
    """The answers of a batch, and its mismatched answers."""
    answers = len(batch.desirable)
    return slice_sequences(batch.sequences, 0, answers), slice_sequences(batch.sequences, answers, 2 * answers)


def labelled_ref_logps(roles: Roles, batch: LabelledBatch) -> Tensor:
    """Log-probs of a labelled batch under the reference: `LabelledBatch.ref_logps` [2B]; 0 if mismatched are empty."""
    answers, mismatched = labelled_parts(batch)
    answer_logps = reference_logps(roles, answers)
    has_mismatched = mismatched.num_tokens > 0
    mismatched_logps = reference_logps(roles, mismatched) if has_mismatched else torch.zeros_like(answer_logps)
    return torch.cat([answer_logps, mismatched_logps])


def response_lengths(targets: ResponseTargets, sequences: int) -> Tensor:
    """Predicted tokens of each sequence, fp32 [S]."""
    ones = torch.ones(targets.targets.shape, device=targets.targets.device)
    return sequence_sums(ones, targets.sequence_ids, sequences)


def with_logps(loss: Loss, beta: float, reference: tuple[Tensor, Tensor] | None, normalizer: int) -> Loss:
    """Add TRL's `logps/` metrics, computed from the rewards: reward = beta (logp - ref_logp)."""
    metrics = dict(loss.metrics)
    for index, side in enumerate(("chosen", "rejected")):
        logps = metrics[f"rewards/{side}"] / beta
        metrics[f"logps/{side}"] = logps if reference is None else logps + reference[index].sum() / normalizer
    return Loss(loss.loss, metrics)


def preference_loss(
    roles: Roles, batch: PreferenceBatch, keywords: Keywords, normalizer: int, *, use_weighting: bool = False
) -> Loss:
    """`dpo_loss` of the policy against the reference on one batch of pairs. `use_weighting`: WPO's weights.

    aot and aot_unpaired sort the whole batch, so their loss is the batch's mean times its share of the normalizer.
    """
    reference = pair_ref_logps(roles, batch) if batch.ref_logps is None else batch.ref_logps
    targets = batch.sequences.targets
    whole = not WHOLE_BATCH.isdisjoint(keywords.get("loss_type", ()))
    options = {**keywords, "normalizer": None if whole else normalizer}
    hidden, head = roles.hidden(batch.sequences, targets.rows), roles.head()
    if use_weighting:
        loss = weighted_loss(hidden, head, targets, reference, options)
    else:
        loss = linear_dpo_loss(
            hidden, head.weight, targets.targets, targets.sequence_ids, reference, **head.keywords(), **options
        )
    if whole:
        # Training has one micro-batch to a step, so that share is 1; evaluation averages over its micro-batches.
        share = batch.num_pairs / normalizer
        loss = Loss(loss.loss * share, {name: value * share for name, value in loss.metrics.items()})
    chosen, rejected = reference.split(batch.num_pairs)
    return with_logps(loss, keywords["beta"], (chosen, rejected), normalizer)


def weighted_loss(
    hidden: Tensor, head: LanguageHead, targets: ResponseTargets, reference: Tensor, options: Keywords
) -> Loss:
    """`dpo_loss` with a weight for each pair, w = exp(m_chosen + m_rejected), detached: how likely its answers are now.

    m = sum_t (log p(y_t) - log sum_v p(v)^2) / length; sum_v p(v)^2 is the expected probability of a sampled token.

    "WPO: Enhancing RLHF with Weighted Preference Optimization", https://arxiv.org/abs/2406.11827.
    """
    ids, sequences = targets.sequence_ids, len(reference)
    tokens = linear_logprobs(hidden, head.weight, targets.targets, return_log_sum_sq_probs=True, **head.keywords())
    assert tokens.log_sum_sq_probs is not None
    lengths = response_lengths(targets, sequences)
    sums = sequence_sums(tokens.logprobs.detach() - tokens.log_sum_sq_probs, ids, sequences)
    chosen, rejected = (sums / lengths.clamp(min=1)).chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    return dpo_loss(
        *sequence_sums(tokens.logprobs, ids, sequences).chunk(2),
        *reference.chunk(2),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=(chosen + rejected).exp(),
        **options,
    )


def reference_free_loss(
    kernel: Callable[..., Loss], roles: Roles, batch: PreferenceBatch, keywords: Keywords, normalizer: int
) -> Loss:
    """`simpo_loss`, `orpo_loss` or `cpo_loss` of the policy on one batch of pairs."""
    targets = batch.sequences.targets
    sequences = 2 * batch.num_pairs
    sums = sequence_sums(roles.logprobs(batch.sequences, targets), targets.sequence_ids, sequences)
    chosen_lengths, rejected_lengths = response_lengths(targets, sequences).chunk(2)
    loss = kernel(
        *sums.chunk(2),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        **keywords,
        normalizer=normalizer,
    )
    return with_logps(loss, keywords["beta"], None, normalizer)


def labelled_loss(roles: Roles, batch: LabelledBatch, keywords: Keywords, normalizer: int) -> Loss:
    """`kto_loss` of the policy against the reference on one batch of labelled answers.

    kl = mean of logp - ref_logp over the batch's mismatched answers, without gradient; 0 if they are empty
    (apo_zero_unpaired). As in TRL, each micro-batch estimates its own kl, so kto depends on the micro-batch size. The
    losses of pairs do not.
    """
    answers, mismatched = labelled_parts(batch)
    reference = labelled_ref_logps(roles, batch) if batch.ref_logps is None else batch.ref_logps
    ref_logps, ref_mismatched = reference.chunk(2)
    kl = torch.zeros((), device=reference.device)
    if mismatched.num_tokens:
        with torch.no_grad():
            kl = (sequence_logps(roles, mismatched) - ref_mismatched).mean()
    logps = sequence_logps(roles, answers)
    loss = kto_loss(logps, ref_logps, batch.desirable, kl, **keywords, normalizer=normalizer)
    sums = {
        "logps/chosen_sum": torch.where(batch.desirable, logps.detach(), 0.0).sum() / normalizer,
        "logps/rejected_sum": torch.where(batch.desirable, 0.0, logps.detach()).sum() / normalizer,
    }
    return Loss(loss.loss, {**loss.metrics, **sums})
