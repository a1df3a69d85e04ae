"""Kullback-Leibler divergences between policy and reference, in nats."""

from .reference import token_kl

__all__ = ["token_kl"]
