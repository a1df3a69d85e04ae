"""nn.Module faces of the functions: numbers and choices at construction, tensors at the call.

The head's weight is an argument of the call and no parameter of these modules: it belongs to the model, where it may be
tied to the embedding.
"""

from .advantages import GAE, GroupAdvantages, MaskedWhiten
from .dpo import CPOLoss, DPOLoss, KTOLoss, LinearDPOLoss, ORPOLoss, SimPOLoss
from .logprob import LinearKL, LinearLogProbs, SelectiveLogSoftmax, TokenKL
from .ppo import LinearPPOLoss, LogitsPPOLoss, PPOLoss, ValueLoss

__all__ = [
    "GAE",
    "CPOLoss",
    "DPOLoss",
    "GroupAdvantages",
    "KTOLoss",
    "LinearDPOLoss",
    "LinearKL",
    "LinearLogProbs",
    "LinearPPOLoss",
    "LogitsPPOLoss",
    "MaskedWhiten",
    "ORPOLoss",
    "PPOLoss",
    "SelectiveLogSoftmax",
    "SimPOLoss",
    "TokenKL",
    "ValueLoss",
]
