"""Preference losses, on sequence log-probabilities and straight from hidden states."""

from .linear import linear_dpo_loss, sequence_sums
from .reference import dpo_loss

__all__ = ["dpo_loss", "linear_dpo_loss", "sequence_sums"]
