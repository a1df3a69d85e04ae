"""The demo: a small generated corpus, and a tiny model to train on it."""
