"""Checkpoints that are whole or not there: written to a temporary folder, synced, renamed, and recognised when torn.

`checkpoint-N/` holds the trained weights (`<role>/`, in PEFT's format for adapters), `training.pt` (optimizer,
schedule, random states; tensors and plain values, read with `weights_only=True`), `state.json` (position in the data,
running metrics) and `manifest.json` (size and SHA-256 of every other file, written last).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from onecard.errors import OnecardError

MANIFEST = "manifest.json"
TRAINING = "training.pt"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and the optimizer steps it has seen."""

    folder: Path
    step: int


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary folder beside `target`, then put it in target's place."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk looks like from Python, torch and Rust
        shutil.rmtree(temporary, ignore_errors=True)
        raise OnecardError(f"{target}: cannot be written ({error}); what was there before is unchanged.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def random_states() -> dict[str, Any]:
    """Every random state that training may draw from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None  # of the one card that trains
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])


def write_checkpoint(
    run_dir: Path,
    step: int,
    *,
    save_weights: Callable[[Path], None],
    training: dict[str, Any],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-<step>` and drop the oldest ones beyond `keep`."""

    def fill(folder: Path) -> None:
        save_weights(folder)
        torch.save({**training, "random": random_states()}, folder / TRAINING)
        (folder / STATE).write_text(json.dumps({**state, "step": step}))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(folder)): [path.stat().st_size, digest(path)] for path in files}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    target = run_dir / f"checkpoint-{step}"
    replace_folder(target, fill)
    for old in [folder for folder in checkpoint_folders(run_dir) if step_of(folder) <= step][keep:]:
        shutil.rmtree(old)
    return target


def step_of(folder: Path) -> int:
    """7 of `checkpoint-7`."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """All `checkpoint-N` folders, newest first, torn ones included."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest names is there with its size and digest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(
            (folder / name).stat().st_size == size and digest(folder / name) == sha
            for name, (size, sha) in manifest.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def newest_checkpoint(run_dir: Path) -> tuple[Checkpoint | None, tuple[Path, ...]]:
    """The newest whole checkpoint, and the torn ones that are newer than it."""
    torn: list[Path] = []
    for folder in checkpoint_folders(run_dir):
        if is_whole(folder):
            return Checkpoint(folder, step_of(folder)), tuple(torn)
        torn.append(folder)
    return None, tuple(torn)


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """`training` and `state` as they were given to `write_checkpoint`; random states are put back."""
    training = torch.load(checkpoint.folder / TRAINING, weights_only=True, map_location="cpu")
    set_random_states(training.pop("random"))
    return training, json.loads((checkpoint.folder / STATE).read_text())


def forget(run_dir: Path, names: tuple[str, ...]) -> None:
    """Remove the named entries and all checkpoints of a run folder, and nothing else that a person may keep there."""
    for path in [*checkpoint_folders(run_dir), *(run_dir / name for name in names)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            with suppress(FileNotFoundError):
                path.unlink()


def forget_after(run_dir: Path, step: int) -> None:
    """Remove checkpoints later than `step` (torn, where a run goes on), and what a killed save left half-written."""
    for path in run_dir.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in checkpoint_folders(run_dir):
        if step_of(folder) > step:
            shutil.rmtree(folder)
