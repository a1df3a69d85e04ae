"""Rewards: scores of sampled responses, from reward models, functions and built-in rewards."""
