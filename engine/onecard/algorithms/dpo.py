"""Direct preference optimization (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290).

    rows -> tokens, masks -> PreferenceBatch -> reference log-probs (adapters off, no grad) -> policy hidden states
    -> linear_dpo_loss -> (loss, metrics)

Left out: the reference's log-probs are computed in each step, not kept from an earlier pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.algorithms.common import Recipe, pair_tokenizer, run_recipe
from onecard.batches import PreferenceBatch, ResponseTargets, pack_pairs, response_targets
from onecard.config import DPOConfig
from onecard.errors import OnecardError
from onecard.models.roles import Roles
from onecard_kernels import Loss, dpo_loss, linear_dpo_loss, sequence_sums
from onecard_kernels.dpo import WHOLE_BATCH


def loss_keywords(config: DPOConfig) -> dict[str, Any]:
    """The keyword arguments of `dpo_loss` that are settings."""
    keywords: dict[str, Any] = {
        "beta": config.beta,
        "loss_type": config.loss_type,
        "loss_weights": config.loss_weights or None,
        "label_smoothing": config.label_smoothing,
        "f_divergence_type": config.f_divergence_type,
        "f_alpha_divergence_coef": config.f_alpha_divergence_coef,
    }
    try:  # the loss itself is the judge of its settings: before anything is loaded, on one pair
        dpo_loss(*torch.zeros(4, 1).unbind(), **keywords)
    except (TypeError, ValueError) as error:
        raise OnecardError(str(error)) from error
    sorting = sorted(WHOLE_BATCH.intersection(config.loss_type))
    if sorting and config.gradient_accumulation_steps > 1:
        raise OnecardError(
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, expected 1 with loss_type "
            f"{sorting[0]}, which sorts the whole batch; raise per_device_train_batch_size instead"
        )
    return keywords


@torch.no_grad()
def reference_logps(roles: Roles, batch: PreferenceBatch, targets: ResponseTargets) -> Tensor:
    """Summed response log-probs [2B] under the reference."""
    with roles.playing("reference"):
        logprobs = roles.logprobs(batch.sequences, targets)
    return sequence_sums(logprobs, targets.sequence_ids, 2 * batch.num_pairs)


def preference_loss(roles: Roles, batch: PreferenceBatch, keywords: dict[str, Any], normalizer: int) -> Loss:
    """`dpo_loss` of the policy against the reference on one record of pairs; aot's sorts within the record."""
    targets = response_targets(batch.sequences)
    reference = reference_logps(roles, batch, targets)
    hidden, head = roles.hidden(batch.sequences, targets.rows), roles.head()
    whole = not WHOLE_BATCH.isdisjoint(keywords.get("loss_type", ()))
    loss = linear_dpo_loss(
        hidden,
        head.weight,
        targets.targets,
        targets.sequence_ids,
        reference,
        **head.keywords(),
        **keywords,
        normalizer=None if whole else normalizer,
    )
    if not whole:
        return loss
    # Training has one micro-batch to a step, so that share is 1; evaluation averages over its micro-batches.
    share = batch.num_pairs / normalizer
    return Loss(loss.loss * share, {name: value * share for name, value in loss.metrics.items()})


def run(config: DPOConfig) -> Path:
    """`onecard dpo`. Returns the folder of the trained policy."""
    keywords = loss_keywords(config)
    recipe = Recipe(
        command="dpo",
        trained="policy",
        tokenize=pair_tokenizer(config),
        collate=pack_pairs,
        count=len,
        loss=lambda roles, batch, normalizer: preference_loss(roles, batch, keywords, normalizer),
        reference=True,
    )
    return run_recipe(config, recipe)
