"""Preference losses, from sequence log-probabilities or from hidden states."""

from .dpo import dpo_loss
from .kto import kto_loss
from .linear import linear_dpo_loss, sequence_sums
from .losses import WHOLE_BATCH
from .reference_free import cpo_loss, orpo_loss, simpo_loss

__all__ = [
    "WHOLE_BATCH",
    "cpo_loss",
    "dpo_loss",
    "kto_loss",
    "linear_dpo_loss",
    "orpo_loss",
    "sequence_sums",
    "simpo_loss",
]
