"""Kullback-Leibler divergences between policy and reference, in nats."""

from .linear import linear_kl
from .token_kl import token_kl

__all__ = ["linear_kl", "token_kl"]
