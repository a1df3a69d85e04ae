"""Training algorithms: SFT, reward models, DPO and its family, PPO. Each: rows -> batch -> loss, metrics."""
