"""Response tokens per second, ours against transformers' `generate`. `python -m benchmarks.rollout --help`."""
