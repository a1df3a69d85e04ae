"""Fused losses for language models on one GPU: exact in fp32, and without `[tokens, vocab]` logits in memory."""

from .advantages import gae, group_advantages, masked_whiten
from .dpo import cpo_loss, dpo_loss, kto_loss, linear_dpo_loss, orpo_loss, sequence_sums, simpo_loss
from .kl import linear_kl, token_kl
from .language_head import LanguageHead, LogitTransform, check_head, find_logit_transform, read_head
from .logprob import linear_logprobs, selective_log_softmax
from .ppo import linear_ppo_loss, logits_ppo_loss, ppo_loss, value_loss
from .records import Advantages, LogProbs, Loss

__all__ = [
    "Advantages",
    "LanguageHead",
    "LogProbs",
    "LogitTransform",
    "Loss",
    "check_head",
    "cpo_loss",
    "dpo_loss",
    "find_logit_transform",
    "gae",
    "group_advantages",
    "kto_loss",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logprobs",
    "linear_ppo_loss",
    "logits_ppo_loss",
    "masked_whiten",
    "orpo_loss",
    "ppo_loss",
    "read_head",
    "selective_log_softmax",
    "sequence_sums",
    "simpo_loss",
    "token_kl",
    "value_loss",
]
