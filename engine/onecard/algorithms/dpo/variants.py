"""The table of losses: what each is computed from, and the settings it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.algorithms.dpo.losses import (
    Keywords,
    labelled_loss,
    labelled_ref_logps,
    pair_ref_logps,
    preference_loss,
    reference_free_loss,
)
from onecard.config import DPOConfig
from onecard.config.dpo import LABELLED, SUMMABLE, UNSUMMABLE
from onecard.models.roles import Roles
from onecard.utils.errors import OnecardError
from onecard_kernels import Loss, cpo_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss


@dataclass(frozen=True)
class Variant:
    """A loss: how a batch's loss is computed, and the settings that it takes.

    `loss(roles, batch, keywords, normalizer)`. `keywords`: keyword argument of the kernel -> setting. `check` calls the
    kernel on constant log-probs, so that it raises for settings out of range. `compute_ref_logps(roles, batch)`: None
    for a loss without a reference. `labelled`: the loss is on labelled answers, not on pairs.
    """

    loss: Callable[[Roles, Any, Keywords, int], Loss]
    check: Callable[..., Loss]
    keywords: Mapping[str, str]
    compute_ref_logps: Callable[[Roles, Any], Tensor] | None = None
    labelled: bool = False


def check_pairs(**keywords: Any) -> Loss:
    return dpo_loss(*torch.zeros(4, 1), **keywords)


def check_free(kernel: Callable[..., Loss], **keywords: Any) -> Loss:
    one = torch.ones(1)
    return kernel(-one, -one, chosen_lengths=one, rejected_lengths=one, **keywords)


def check_labelled(**keywords: Any) -> Loss:
    zero = torch.zeros(1)
    return kto_loss(zero, zero, zero.bool(), zero[0], **keywords)


def reference_free(kernel: Callable[..., Loss], keywords: Mapping[str, str]) -> Variant:
    """A loss of pairs without a reference."""
    return Variant(partial(reference_free_loss, kernel), partial(check_free, kernel), keywords)


SUMMABLE_VARIANT = Variant(preference_loss, check_pairs, SUMMABLE, compute_ref_logps=pair_ref_logps)
VARIANTS: dict[str, Variant] = {
    "simpo": reference_free(simpo_loss, UNSUMMABLE["simpo"]),
    "orpo": reference_free(orpo_loss, UNSUMMABLE["orpo"]),
    "cpo": reference_free(cpo_loss, UNSUMMABLE["cpo"]),
    **{
        name: Variant(labelled_loss, check_labelled, UNSUMMABLE[name], labelled_ref_logps, labelled=True)
        for name in LABELLED
    },
}


def pick_variant(config: DPOConfig) -> Variant:
    """The variant of `loss_type`; all losses that can be summed have the same."""
    return VARIANTS.get(config.loss_type[0], SUMMABLE_VARIANT)


def loss_keywords(config: DPOConfig) -> Keywords:
    """The kernel's keyword arguments, from the settings. Raises OnecardError for values that the kernel refuses."""
    variant = pick_variant(config)
    keywords = {name: getattr(config, setting) for name, setting in variant.keywords.items()}
    if "loss_weights" in keywords:
        keywords["loss_weights"] = config.loss_weights or None
    try:  # the kernel validates its arguments; here it runs on one pair or answer, before anything is loaded
        variant.check(**keywords)
    except (TypeError, ValueError) as error:
        raise OnecardError(named_by_settings(str(error), variant)) from error
    return keywords


def named_by_settings(message: str, variant: Variant) -> str:
    """A kernel's error message with the keyword at its start replaced by the setting's name."""
    keyword, _, rest = message.partition(" ")
    return f"{variant.keywords.get(keyword, keyword)} {rest}"
