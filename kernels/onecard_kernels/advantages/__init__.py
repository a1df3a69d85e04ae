"""Advantages from rewards. All results are detached: they are constants of the policy gradient."""

from .generalized import gae
from .normalize import group_advantages, masked_whiten

__all__ = ["gae", "group_advantages", "masked_whiten"]
