"""A lock file that lets only one process run in a run folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from onecard.utils.errors import OnecardError

LOCK = "run.lock"
_locked: set[Path] = set()  # by this process: a POSIX lock does not keep a process from locking a file twice


def in_use(folder: Path, process_id: str) -> OnecardError:
    """The error for a folder that a running process has locked."""
    return OnecardError(
        f"output_dir: process {process_id} is running in {folder}; wait for it, stop it, or choose another folder."
    )


def check_unlocked(folder: Path) -> None:
    """Raise if a running process has locked the folder. Writes nothing."""
    path = folder / LOCK
    if path in _locked:
        raise in_use(folder, str(os.getpid()))
    if not path.is_file():
        return
    with open(path, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise in_use(folder, file.read().strip()) from None


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Context in which this process has the folder locked. The system removes the lock if the process is killed.

    Forked workers do not inherit the lock, so a worker that outlives the process does not keep the folder locked.
    """
    path = folder / LOCK
    file = open_locked(folder)
    _locked.add(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _locked.discard(path)
        file.close()


def open_locked(folder: Path) -> IO[str]:
    """Open and lock the lock file, and write this process's id into it."""
    path = folder / LOCK
    if path in _locked:
        raise in_use(folder, str(os.getpid()))
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")  # closed by `lock_folder`
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            process_id = file.read().strip()
            file.close()
            raise in_use(folder, process_id) from None
        try:  # its owner may have removed the file after it was opened here
            still_there = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except FileNotFoundError:
            still_there = False
        if still_there:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()
