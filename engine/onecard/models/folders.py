"""Which folders hold a model's or an adapter's weights."""

from __future__ import annotations

from pathlib import Path

TRAINED = ("policy", "reward")  # folders of the trained weights in a finished run's folder


def holds_weights(folder: Path) -> bool:
    """Whether a folder is a model's or an adapter's."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def weights_folder(path: Path) -> Path:
    """`path`, or the folder of the trained weights in it where it is a run folder."""
    inside = (path / role for role in TRAINED)
    return path if holds_weights(path) else next(filter(holds_weights, inside), path)
