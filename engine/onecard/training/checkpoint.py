"""Atomic checkpoints: written to a temporary folder, synced, renamed. Their manifest shows whether they are damaged.

`checkpoint-N/` holds the trained weights (`<role>/`, in PEFT's format for adapters), `training.pt` (optimizer,
schedule, random states; tensors and plain values, read with `weights_only=True`), `state.json` (position in the data,
running metrics) and `manifest.json` (the run's id, size and SHA-256 of every other file, and how many rows the run's
logs had; written last).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onecard.utils.errors import OnecardError, reason
from onecard.utils.files import digest, list_files, remove_files, replace_folder

MANIFEST = "manifest.json"
TRAINING = "training.pt"
STATE = "state.json"
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, its step, and how many rows each log had when it was written."""

    folder: Path
    step: int
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`: run id, step, size and SHA-256 of each file, count and SHA-256 of log rows."""

    run: str
    step: int
    files: Mapping[str, tuple[int, str]]
    rows: Mapping[str, tuple[int, str]]


def random_states() -> dict[str, Any]:
    """States of all random generators that training may use."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None  # of the GPU that trains
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])


def count_and_digest(path: Path, count: int | None = None) -> tuple[int, str]:
    """Number of a log's rows, of the first `count` at most, and their SHA-256."""
    lines = path.read_bytes().splitlines(keepends=True)[:count] if path.exists() else []
    return len(lines), hashlib.sha256(b"".join(lines)).hexdigest()


def write_checkpoint(
    run_dir: Path,
    step: int,
    *,
    run: str,
    save_weights: Callable[[Path], None],
    training: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    logs: tuple[str, ...] = (),
) -> Path:
    """Write `checkpoint-<step>` of the run with id `run`, and remove all but its newest `keep` checkpoints."""

    def fill(folder: Path) -> None:
        save_weights(folder)
        torch.save({**training, "random": random_states()}, folder / TRAINING)
        (folder / STATE).write_text(json.dumps({**state, "step": step}))
        manifest = {
            "run": run,
            "step": step,
            "rows": {name: count_and_digest(run_dir / name) for name in logs},
            "files": {name: [(folder / name).stat().st_size, digest(folder / name)] for name in list_files(folder)},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest))

    target = run_dir / f"checkpoint-{step}"
    replace_folder(target, fill)
    remove_old_checkpoints(run_dir, step, run=run, keep=keep)
    return target


def remove_old_checkpoints(run_dir: Path, step: int, *, run: str, keep: int) -> None:
    """Of a run's checkpoints up to `step`, remove all but the newest `keep`, and empty folders of earlier removals."""
    up_to_step = [folder for folder in checkpoint_folders(run_dir) if step_of(folder) <= step]
    own = [each for each in up_to_step if (manifest := read_manifest(each)) and manifest.run == run]
    for old in own[keep:]:
        remove_checkpoint(old)
    for folder in up_to_step:
        if folder.is_dir() and not list_files(folder):
            remove_files(folder, ())


def remove_checkpoint(folder: Path) -> None:
    """Remove the files that a checkpoint's manifest lists, the manifest last. Other files are not touched."""
    manifest = read_manifest(folder)
    assert manifest is not None
    remove_files(folder, [*manifest.files, MANIFEST])


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name: 7 for `checkpoint-7`."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """All `checkpoint-N`, newest first, damaged ones included."""
    folders = [path for path in run_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if it is missing or damaged. Raises on a read error."""
    try:
        contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in contents["files"].items()}
        rows = {str(name): (int(count), str(sha)) for name, (count, sha) in contents["rows"].items()}
        return Manifest(str(contents["run"]), int(contents["step"]), files, rows)
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError, TypeError, KeyError):
        return None
    except OSError as error:
        raise unreadable(folder / MANIFEST, error) from error


def unreadable(path: Path, error: OSError) -> OnecardError:
    """The error for a file that cannot be read now; it may not be damaged, so the checkpoint is not skipped."""
    return OnecardError(f"output_dir: {path} cannot be read ({reason(error)}); nothing was changed.")


def is_complete(folder: Path, manifest: Manifest) -> bool:
    """Whether every file that the manifest lists has the listed size and digest."""
    for name, (size, sha) in manifest.files.items():
        path = folder / name
        try:
            if path.is_symlink() or path.stat().st_size != size or digest(path) != sha:
                return False
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as error:
            raise unreadable(path, error) from error
    return True


def newest_checkpoint(run_dir: Path, run: str) -> tuple[Checkpoint | None, tuple[Path, ...]]:
    """The newest complete checkpoint of a run, and the damaged ones that are newer. Raises for one of another run."""
    damaged: list[Path] = []
    for folder in checkpoint_folders(run_dir):
        manifest = read_manifest(folder)
        if manifest is None or not is_complete(folder, manifest):
            damaged += [folder] if list_files(folder) else []  # an interrupted removal leaves an empty folder
            continue
        if manifest.run != run:
            raise OnecardError(f"output_dir: {folder} is a checkpoint of another run; move it away.")
        if manifest.step != step_of(folder):
            raise OnecardError(f"output_dir: {folder} was written as checkpoint-{manifest.step}; rename it back.")
        check_rows(run_dir, folder, manifest)
        rows = {name: count for name, (count, _) in manifest.rows.items()}
        return Checkpoint(folder, manifest.step, rows), tuple(damaged)
    return None, tuple(damaged)


def check_rows(run_dir: Path, folder: Path, manifest: Manifest) -> None:
    """Raise if a log does not begin with the rows that it had when the checkpoint was written."""
    for name, (count, sha) in manifest.rows.items():
        try:
            rows, rows_digest = count_and_digest(run_dir / name, count)
        except OSError as error:
            raise unreadable(run_dir / name, error) from error
        if rows < count:
            raise OnecardError(f"output_dir: {run_dir / name} has {rows} rows, expected {count} at {folder.name}.")
        if rows_digest != sha:
            raise OnecardError(f"output_dir: {run_dir / name} was changed after {folder.name} was written.")


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `training` and `state` as given to `write_checkpoint`, and restore the random states."""
    training = torch.load(checkpoint.folder / TRAINING, weights_only=True, map_location="cpu")
    set_random_states(training.pop("random"))
    return training, json.loads((checkpoint.folder / STATE).read_text())
