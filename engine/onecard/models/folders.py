"""Finds the folder of a model's or an adapter's weights."""

from __future__ import annotations

from pathlib import Path

TRAINED = ("policy", "reward")  # folders of trained weights in the folder of a finished run


def holds_weights(folder: Path) -> bool:
    """Whether a folder is a model folder or an adapter folder."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def weights_folder(path: Path) -> Path:
    """The folder of trained weights in `path` if it is a run folder; else `path`."""
    inside = (path / role for role in TRAINED)
    return path if holds_weights(path) else next(filter(holds_weights, inside), path)
