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

from onecard.algorithms.common import load_examples, longest_sequence, run_task
from onecard.batches import PreferenceBatch, ResponseTargets, pack_pairs, response_targets
from onecard.config import DPOConfig
from onecard.data import preference_examples
from onecard.errors import OnecardError
from onecard.models.build import load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.runs import open_run, with_folder
from onecard.trainer import Task
from onecard_kernels import Loss, dpo_loss, linear_dpo_loss, sequence_sums


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
    return keywords


@torch.no_grad()
def reference_logps(roles: Roles, batch: PreferenceBatch, targets: ResponseTargets) -> Tensor:
    """Summed response log-probs [2B] under the reference."""
    with roles.playing("reference"):
        logprobs = roles.logprobs(batch.sequences, targets)
    return sequence_sums(logprobs, targets.sequence_ids, 2 * batch.num_pairs)


def preference_loss(roles: Roles, batch: PreferenceBatch, keywords: dict[str, Any], normalizer: int) -> Loss:
    """`dpo_loss` of the policy against the reference on one record of pairs."""
    targets = response_targets(batch.sequences)
    reference = reference_logps(roles, batch, targets)
    hidden, head = roles.hidden(batch.sequences, targets.rows), roles.head()
    return linear_dpo_loss(
        hidden,
        head.weight,
        targets.targets,
        targets.sequence_ids,
        reference,
        **head.keywords(),
        **keywords,
        normalizer=normalizer,
    )


def run(config: DPOConfig) -> Path:
    """`onecard dpo`. Returns the folder of the trained policy."""
    config = with_folder(config, "dpo")
    run = open_run(config)
    keywords = loss_keywords(config)
    tokenizer = load_tokenizer(config)
    max_length = longest_sequence(config)
    training, heldout = load_examples(
        config,
        lambda rows: preference_examples(rows, tokenizer, max_length=max_length, skip_bad_rows=config.skip_bad_rows),
    )
    roles = load_roles(config, trained="policy", reference=True)
    task = Task(
        name="dpo",
        train=training,
        heldout=heldout,
        collate=pack_pairs,
        count=len,
        tokens=len,
        loss=lambda batch, normalizer: preference_loss(roles, batch, keywords, normalizer),
    )
    return run_task(config, task, roles, tokenizer, run)
