"""PPO's clipped losses: the policy's from log-probabilities, logits or hidden states, and the value function's."""

from .linear import linear_ppo_loss
from .losses import logits_ppo_loss, ppo_loss, value_loss

__all__ = ["linear_ppo_loss", "logits_ppo_loss", "ppo_loss", "value_loss"]
