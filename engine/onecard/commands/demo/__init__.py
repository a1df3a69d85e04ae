"""The demo's own material: a small corpus written by this project, and a tiny model to train on it."""
