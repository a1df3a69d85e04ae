"""onecard: SFT, reward models, DPO and PPO for language models on one GPU."""

__version__ = "0.1.0"
