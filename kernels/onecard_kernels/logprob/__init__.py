"""Logits or hidden states to per-token log-probabilities and entropies."""

from .linear import linear_logprobs
from .selective import selective_log_softmax

__all__ = ["linear_logprobs", "selective_log_softmax"]
