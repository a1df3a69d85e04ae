"""Folders that a command fills in one go: what may be there before, and how they come to be whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from onecard.errors import OnecardError


def output_folder(output_dir: str, replaced: Collection[str] = ()) -> Path:
    """The folder of that name, for `checkpoint.replace_folder`. It may hold nothing but files that it is to replace."""
    if not output_dir:
        raise OnecardError("--output_dir is missing: give a new folder.")
    folder = Path(output_dir).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise OnecardError(f"output_dir: {output_dir} is a file, expected a folder or a new name.")
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OnecardError(f"output_dir: {parent} cannot be written to.")
    others = sorted(path.name for path in folder.iterdir() if path.name not in replaced) if folder.exists() else []
    if others:
        what = "a training run" if "config.yaml" in others else f"'{others[0]}'"
        raise OnecardError(f"output_dir: {output_dir} holds {what}; expected a new or an empty folder.")
    return folder
