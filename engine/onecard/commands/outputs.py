"""Checks of the output file or folder of a command."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from onecard.config import GenerateConfig
from onecard.utils.errors import OnecardError


def output_file(config: GenerateConfig) -> Path:
    """The path of `output`: a new file or, with --overwrite, a regular file other than the dataset.

    Other paths raise `OnecardError`.
    """
    path = Path(config.output).expanduser().absolute()
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OnecardError(f"output: {config.output} cannot be written: expected a writable folder, got {path.parent}.")
    if not os.path.lexists(path):
        return path
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OnecardError(f"output: {config.output} is a folder, a link or a device, expected a file or a new name.")
    if os.path.exists(config.dataset) and path.samefile(config.dataset):
        raise OnecardError(f"output: {config.output} is the dataset itself; give another name.")
    if not config.overwrite:
        raise OnecardError(f"output: {config.output} exists. Give --overwrite to replace it, or another name.")
    return path


def output_folder(output_dir: str, replaceable: Collection[str] = ()) -> Path:
    """The path of an output folder, for `files.replace_folder`: a new folder, or one with only files in `replaceable`.

    Other paths raise `OnecardError`.
    """
    if not output_dir:
        raise OnecardError("--output_dir is missing: give a new folder.")
    folder = Path(output_dir).expanduser().absolute()
    if os.path.lexists(folder) and not folder.is_dir():
        raise OnecardError(f"output_dir: {output_dir} is a file, expected a folder or a new name.")
    folder = folder.resolve()
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OnecardError(f"output_dir: {parent} cannot be written to.")
    others = sorted(path.name for path in folder.iterdir() if path.name not in replaceable) if folder.exists() else []
    if others:
        content = "a training run" if "config.yaml" in others else f"'{others[0]}'"
        raise OnecardError(f"output_dir: {output_dir} has {content} in it, expected a new or an empty folder.")
    return folder
