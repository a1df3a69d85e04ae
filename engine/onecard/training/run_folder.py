"""The run folder: whether a run may start in it, and its `run.json`, `config.yaml` and `metrics.jsonl`.

A folder is a run folder if it has a `run.json`, which is written before all other files. A run replaces and removes
only its own files: `FILES`, those that `run.json` lists, and those that the manifests of its checkpoints list.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from onecard.config import TrainConfig
from onecard.data.templates import today
from onecard.models.folders import TRAINED, weights_folder
from onecard.training import checkpoint, lock
from onecard.training.checkpoint import Checkpoint
from onecard.utils.errors import OnecardError
from onecard.utils.files import TEMPORARY, list_files, mark_damaged, recover, remove_files, replace_folder, write_text

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # answers to held-out prompts
RUN_JSON = "run.json"
REPORT = "report.html"
LOGS = (METRICS, SAMPLES)
FILES = (CONFIG, METRICS, SAMPLES, RUN_JSON, REPORT)
FOLDERS = ("plots", *TRAINED)
OWN_NAMES = (*FILES, *FOLDERS)
# Settings that a resumed run may change: they do not change the training, only when it logs, evaluates and saves.
CHANGEABLE_SETTINGS = {"output_dir", "resume", "overwrite", "dry_run", "save_steps", "save_total_limit"}
CHANGEABLE_SETTINGS |= {"reward_timeout", "logging_steps", "eval_steps", "eval_samples", "eval_sample_length"}

C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True)
class RunInfo:
    """The contents of `run.json`.

    `date`: the day on which the run began; chat templates may use it. `settings`: digest of the settings in
    `config.yaml`. `identity`: the command, and digests of the data and weights that it reads. `replaces`: ids of
    overwritten runs some of whose files may still exist. `files`: file names in each exported folder.
    """

    id: str
    date: str
    settings: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run that may start in `folder`. `checkpoint`: where it resumes, None for a new run. `notes`: lines to print.

    `previous`: info of the run that the folder already has; `damaged`: its newer checkpoints, which are skipped.
    """

    folder: Path
    info: RunInfo
    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    previous: RunInfo | None = None
    damaged: tuple[Path, ...] = ()


def with_output_dir(config: C, command: str) -> C:
    """The same settings with `output_dir` filled in."""
    return config if config.output_dir else replace(config, output_dir=f"runs/{command}")


# --- run.json


def read_info(folder: Path) -> RunInfo | None:
    """The run.json of a folder; None if it is missing or belongs to another program."""
    try:
        contents = json.loads((folder / RUN_JSON).read_text(encoding="utf-8"))
        return RunInfo(
            id=str(contents.pop("id")),
            date=datetime.fromisoformat(contents.pop("date")).strftime("%Y-%m-%d"),
            settings=str(contents.pop("settings")),
            replaces=tuple(map(str, contents.pop("replaces"))),
            files={str(name): tuple(map(str, names)) for name, names in contents.pop("files").items()},
            identity={str(name): str(value) for name, value in contents.items()},
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError as error:
        raise checkpoint.unreadable(folder / RUN_JSON, error) from error


def write_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`: the identity's entries, then the other fields."""
    own = {"id": info.id, "date": info.date, "settings": info.settings, "replaces": info.replaces, "files": info.files}
    write_text(folder / RUN_JSON, json.dumps({**info.identity, **own}, indent=1) + "\n")


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that must be the same in a resumed run."""
    fixed = {name: value for name, value in sorted(settings.items()) if name not in CHANGEABLE_SETTINGS}
    return hashlib.sha256(json.dumps(fixed, default=str).encode()).hexdigest()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's `config.yaml`. Raises if the file has been changed."""
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    info = read_info(folder)
    if not isinstance(settings, dict) or info is None:
        raise OnecardError(f"{folder} holds a run but no readable {CONFIG} with its settings.")
    if settings_digest(settings) != info.settings:
        raise OnecardError(f"{folder / CONFIG} has been changed or truncated since the run wrote it.")
    return settings


def check_same_settings(config: TrainConfig, folder: Path) -> None:
    """Raise if a resumed run's settings differ from those of the run in the folder, except `CHANGEABLE_SETTINGS`."""
    previous = read_settings(folder)
    for name, value in asdict(config).items():
        if name not in CHANGEABLE_SETTINGS and name in previous and previous[name] != value:
            raise OnecardError(
                f"--resume: {name} is {value!r} here and {previous[name]!r} in {folder / CONFIG}; "
                "resume with the same settings, or start a new run in another output_dir."
            )


def check_same_run(info: RunInfo, identity: Mapping[str, str], folder: Path) -> None:
    """Raise if a resumed run is another command, or its data or weights have changed."""
    for name, value in identity.items():
        if info.identity.get(name) != value:
            raise OnecardError(
                f"--resume: expected the {name} of the run in {folder}, got something else ({RUN_JSON}); resume with "
                "the same, or start a new run in another output_dir."
            )


# --- whether a run may start


def open_run(config: TrainConfig) -> Run:
    """Decide whether a command starts, replaces or resumes a run in its folder. Writes nothing."""
    folder = Path(config.output_dir).absolute()
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a broken link" if folder.is_symlink() else "a file"
        raise OnecardError(f"output_dir: {folder} is {kind}, expected a folder or a new name.")
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise OnecardError(f"output_dir: {parent} cannot be written to.")
    new = RunInfo(uuid.uuid4().hex, today())
    if config.dry_run:
        return Run(folder, new)
    lock.check_unlocked(folder)
    previous = read_info(folder)
    if previous is None:
        check_inputs_are_kept(config, folder)
        check_no_foreign_files(folder)
        return Run(folder, new)
    if not (config.overwrite or config.resume):
        raise OnecardError(
            f"output_dir: {folder} holds a run already; add --resume to continue it, "
            "--overwrite to replace it, or choose another folder."
        )
    check_only_own_files(folder, previous)
    new = replace(new, replaces=(*previous.replaces, previous.id))
    if config.overwrite and not config.resume:
        check_inputs_are_kept(config, folder)
        return Run(folder, new, previous=previous)
    newest, damaged = checkpoint.newest_checkpoint(folder, previous.id) if not previous.replaces else (None, ())
    if damaged and (newest is None or any((folder / role).is_dir() for role in TRAINED)):
        state = "the run has no complete checkpoint" if newest is None else "the run has ended"
        raise OnecardError(
            f"--resume: {damaged[0]} is damaged (files are missing or changed), and {state}; "
            "add --overwrite to replace the run, or choose another output_dir."
        )
    if newest is None:
        check_inputs_are_kept(config, folder)
        note = "no complete checkpoint to resume from: starting at step 0."
        return Run(folder, new, notes=(note,), previous=previous)
    check_same_settings(config, folder)
    notes = [f"{each.name} is damaged (files are missing or changed) and is skipped." for each in damaged]
    notes.append(f"resuming from {newest.folder}.")
    return Run(folder, previous, newest, tuple(notes), previous, damaged)


def check_no_foreign_files(folder: Path) -> None:
    """Raise if a folder without a run has files that a run would replace."""
    existing = [folder / name for name in OWN_NAMES if os.path.lexists(folder / name)]
    existing += checkpoint.checkpoint_folders(folder)
    if existing:
        raise OnecardError(
            f"output_dir: {folder} is not a run folder, but has '{existing[0].name}', which a run would replace; "
            "choose another folder."
        )


def check_only_own_files(folder: Path, info: RunInfo) -> None:
    """Raise if a file of the run is not a regular file, or if a folder of the run has other files."""
    for name in (*FILES, lock.LOCK):
        path = folder / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise OnecardError(f"output_dir: {path} is not a regular file; move it away.")
    known: dict[Path, Sequence[str]] = {folder / name: info.files.get(name, ()) for name in FOLDERS}
    for each in checkpoint.checkpoint_folders(folder):
        manifest = checkpoint.read_manifest(each) if not each.is_symlink() else None
        if manifest is not None:
            known[each] = [*manifest.files, checkpoint.MANIFEST]
        elif each.is_symlink() or not each.is_dir() or (list_files(each) and not (each / checkpoint.STATE).is_file()):
            raise OnecardError(f"output_dir: {each} is not a checkpoint of the run; move it away.")
        if manifest is not None and manifest.run not in (info.id, *info.replaces):
            raise OnecardError(f"output_dir: {each} is a checkpoint of another run; move it away.")
    for path, names in known.items():
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            raise OnecardError(f"output_dir: {path} is not a plain folder; move it away.")
        other = sorted(set(list_files(path)) - set(names)) if path.is_dir() else []
        if other:
            raise OnecardError(f"output_dir: {path / other[0]} is not a file of the run; move it away.")


def check_inputs_are_kept(config: TrainConfig, folder: Path) -> None:
    """Raise if a new run would replace files that it reads."""
    removed = [*checkpoint.checkpoint_folders(folder), *(folder / name for name in OWN_NAMES)]
    for setting, value in config.input_paths().items():
        if any(weights_folder(Path(value)).resolve().is_relative_to(path.resolve()) for path in removed):
            raise OnecardError(
                f"{setting}: {value} is part of the run in {folder} that would be replaced; choose another output_dir."
            )


# --- writing


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Context in which the run's folder exists and is locked. Raises if another run was started there since `open_run`.

    Folders that are created here and stay empty are removed.
    """
    created = [path for path in (run.folder, *run.folder.parents) if not path.exists()]
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock.lock_folder(run.folder):
            if read_info(run.folder) != run.previous:
                raise OnecardError(f"output_dir: another process has started a run in {run.folder}.")
            yield
    finally:
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def begin(run: Run, config: TrainConfig, identity: dict[str, str]) -> None:
    """Write `run.json`, remove an overwritten run's files, write `config.yaml`, and truncate the logs.

    `identity`: the command, and digests of the data and weights; a resumed run must have the same. After a kill at any
    point of this function, `--resume` and `--overwrite` both work.
    """
    settings = {**asdict(config), "output_dir": str(run.folder), "resume": False, "overwrite": False}
    text = yaml.safe_dump(settings, sort_keys=False)
    digest = settings_digest(yaml.safe_load(text))
    if run.checkpoint is not None:
        assert run.previous is not None
        check_same_run(run.previous, identity, run.folder)
        for each in run.damaged:
            mark_damaged(each)
        remove_temporaries(run.folder)
        for name in LOGS:
            truncate_log(run.folder / name, run.checkpoint.rows.get(name, 0))
        if digest == run.previous.settings:  # not if this version of onecard has other settings than the run's
            write_text(run.folder / CONFIG, text)
        return
    files = run.previous.files if run.previous else {}
    info = replace(run.info, settings=digest, identity=identity)
    write_info(run.folder, replace(info, files=files))
    remove_temporaries(run.folder)
    remove_run(run.folder, info.replaces, files)
    write_text(run.folder / CONFIG, text)
    (run.folder / METRICS).touch()
    write_info(run.folder, replace(info, replaces=()))


def remove_run(folder: Path, ids: Sequence[str], files: Mapping[str, Sequence[str]]) -> None:
    """Remove the files of earlier runs. Damaged checkpoints are renamed."""
    for each in checkpoint.checkpoint_folders(folder):
        manifest = checkpoint.read_manifest(each)
        if manifest is not None and manifest.run in ids:
            checkpoint.remove_checkpoint(each)
        elif list_files(each):
            mark_damaged(each)
        else:
            remove_files(each, ())
    for name in FOLDERS:
        if (folder / name).is_dir():
            remove_files(folder / name, files.get(name, ()))
    for name in FILES:
        if name != RUN_JSON:
            (folder / name).unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files and folders of the run that killed processes left behind."""
    names = {match["name"] for path in folder.glob(".*") if (match := TEMPORARY.fullmatch(path.name))}
    for name in names:
        if name in OWN_NAMES or checkpoint.NAME.fullmatch(name):
            recover(folder / name)


def truncate_log(path: Path, count: int) -> None:
    """Truncate a log to its first `count` rows."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        write_text(path, b"".join(lines[:count]).decode("utf-8"))


def write_folder(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """Write the folder `policy`, `reward` or `plots` of a run atomically, and list its files in `run.json`."""

    def fill(temporary: Path) -> None:
        write(temporary)
        info = read_info(folder)
        if info is not None:
            files = dict(info.files)
            files[name] = tuple(sorted({*files.get(name, ()), *list_files(temporary)}))
            write_info(folder, replace(info, files=files))

    replace_folder(folder / name, fill)


def log(folder: Path, row: dict[str, Any], name: str = METRICS) -> None:
    """Append one row to `metrics.jsonl` or to another log."""
    with open(folder / name, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
