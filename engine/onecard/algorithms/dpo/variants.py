"""The table of losses: what each is computed from, and the settings it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.algorithms.dpo.losses import (
    Keywords,
    labelled_loss,
    labelled_reference,
    pair_reference,
    preference_loss,
    reference_free_loss,
)
from onecard.config import DPOConfig
from onecard.models.roles import Roles
from onecard.utils.errors import OnecardError, nearest
from onecard_kernels import Loss, cpo_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss
from onecard_kernels.dpo import WHOLE_BATCH
from onecard_kernels.dpo.losses import LOSSES

REFERENCE = ("ref_adapter", "precompute_ref_log_probs")


@dataclass(frozen=True)
class Variant:
    """One kind of loss. `keywords` are the kernel's, each with the setting that it comes from.

    `loss(roles, record, keywords, normalizer)`; `reference(roles, record)` are the record's `ref_logps`, None where
    there is no reference. `judge` is the kernel on made-up log-probs, whose complaints are those of the settings.
    `settings` are the ones it takes beyond those of its keywords.
    """

    loss: Callable[[Roles, Any, Keywords, int], Loss]
    judge: Callable[..., Loss]
    keywords: Mapping[str, str]
    reference: Callable[[Roles, Any], Tensor] | None = None
    labelled: bool = False
    settings: tuple[str, ...] = ()


def same(*names: str) -> dict[str, str]:
    """Keywords that are called as their settings are."""
    return {name: name for name in names}


def judge_pairs(**keywords: Any) -> Loss:
    return dpo_loss(*torch.zeros(4, 1), **keywords)


def judge_free(kernel: Callable[..., Loss], **keywords: Any) -> Loss:
    one = torch.ones(1)
    return kernel(-one, -one, chosen_lengths=one, rejected_lengths=one, **keywords)


def judge_labelled(**keywords: Any) -> Loss:
    zero = torch.zeros(1)
    return kto_loss(zero, zero, zero.bool(), zero[0], **keywords)


def reference_free(kernel: Callable[..., Loss], keywords: Mapping[str, str]) -> Variant:
    """A loss of pairs without a reference."""
    return Variant(partial(reference_free_loss, kernel), partial(judge_free, kernel), keywords)


PAIRED = Variant(
    loss=preference_loss,
    judge=judge_pairs,
    keywords=same(
        "beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
        "discopop_tau",
    ),
    reference=pair_reference,
    settings=("use_weighting", *REFERENCE),
)  # fmt: skip
LABELLED = Variant(
    loss=labelled_loss,
    judge=judge_labelled,
    keywords=same("beta", "desirable_weight", "undesirable_weight"),
    reference=labelled_reference,
    labelled=True,
    settings=REFERENCE,
)

# loss_type -> what it is, of those that are not one of the sum that PAIRED is.
ALONE: dict[str, Variant] = {
    "simpo": reference_free(simpo_loss, {**same("beta", "label_smoothing"), "gamma": "simpo_gamma"}),
    "orpo": reference_free(orpo_loss, same("beta")),
    "cpo": reference_free(cpo_loss, same("beta", "label_smoothing", "cpo_alpha")),
    "kto": LABELLED,
    "apo_zero_unpaired": LABELLED,
}

# Settings that some losses take and others do not.
OPTIONAL = {
    name
    for variant in (PAIRED, *ALONE.values())
    for name in (*variant.keywords.values(), *variant.settings)
    if name != "loss_type"
}


def pick_variant(config: DPOConfig) -> Variant:
    """The kind of loss that `loss_type` asks for, once its settings go together."""
    names = config.loss_type
    for name in names:
        if name not in LOSSES and name not in ALONE:
            known = (*LOSSES, *ALONE)
            hint = nearest(name, known) or f" Expected one of {', '.join(known)}."
            raise OnecardError(f"loss_type: no loss is called '{name}'.{hint}")
    alone = [name for name in names if name in ALONE]
    if alone and len(names) > 1:
        raise OnecardError(f"loss_type: {alone[0]} stands alone, and came with {len(names) - 1} more: {names}.")
    variant = ALONE[alone[0]] if alone else PAIRED
    taken = {*variant.keywords.values(), *variant.settings}
    unset = DPOConfig()
    for name in sorted(OPTIONAL - taken):
        value = getattr(config, name)
        if value != getattr(unset, name):
            raise OnecardError(f"{name}: {value!r} came, but loss_type {names[0]} does not take this setting.")
    check_together(config)
    return variant


def check_together(config: DPOConfig) -> None:
    """What the kernels cannot see of a loss that sorts a whole batch."""
    sorting: Sequence[str] = sorted(WHOLE_BATCH.intersection(config.loss_type))
    if not sorting:
        return
    if config.gradient_accumulation_steps > 1:
        raise OnecardError(
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, expected 1 with loss_type "
            f"{sorting[0]}, which sorts the whole batch; raise per_device_train_batch_size instead"
        )
    if config.micro_batch_tokens > 0:
        raise OnecardError(
            f"micro_batch_tokens is {config.micro_batch_tokens}, expected 0 with loss_type {sorting[0]}, which sorts "
            "the whole batch"
        )
    if config.use_weighting:
        raise OnecardError(
            f"use_weighting: loss_type {sorting[0]} sorts the whole batch, so no weight belongs to one of its terms."
        )


def loss_keywords(config: DPOConfig) -> Keywords:
    """The keyword arguments of the kernel that are settings."""
    variant = pick_variant(config)
    keywords = {name: getattr(config, setting) for name, setting in variant.keywords.items()}
    if "loss_weights" in keywords:
        keywords["loss_weights"] = config.loss_weights or None
    try:  # the loss itself is the judge of its settings: before anything is loaded, on one answer or pair
        variant.judge(**keywords)
    except (TypeError, ValueError) as error:
        raise OnecardError(named_by_settings(str(error), variant)) from error
    return keywords


def named_by_settings(message: str, variant: Variant) -> str:
    """A kernel's complaint, which begins with its keyword, under the name of the setting."""
    keyword, _, rest = message.partition(" ")
    return f"{variant.keywords.get(keyword, keyword)} {rest}"
