"""Losses for language models on one card: fused, exact in fp32, and never holding `[tokens, vocab]` logits."""

from .dpo import dpo_loss, linear_dpo_loss, sequence_sums
from .kl import token_kl
from .logprob import linear_logprobs, selective_log_softmax
from .records import LogProbs, Loss

__all__ = [
    "LogProbs",
    "Loss",
    "dpo_loss",
    "linear_dpo_loss",
    "linear_logprobs",
    "selective_log_softmax",
    "sequence_sums",
    "token_kl",
]
