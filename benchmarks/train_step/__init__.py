"""Whole training steps: DPO against TRL's `DPOTrainer`, and PPO by phases. `python -m benchmarks.train_step --help`."""
