"""One process at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from onecard.errors import OnecardError

LOCK = "run.lock"
_held: set[Path] = set()  # of this process: the system lets a process lock a file twice


def taken(folder: Path, by: str) -> OnecardError:
    return OnecardError(
        f"output_dir: process {by} is at work in {folder}; wait for it, stop it, or choose another folder."
    )


def check_free(folder: Path) -> None:
    """Stop if a process that lives holds the folder. Writes nothing."""
    path = folder / LOCK
    if path in _held:
        raise taken(folder, str(os.getpid()))
    if not path.is_file():
        return
    with open(path, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise taken(folder, file.read().strip()) from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process can hold the folder. The system lets go of it when the process ends, however it ends.

    Workers that the process forks do not hold it, so one that outlives it does not keep the folder.
    """
    path = folder / LOCK
    file = locked(folder)
    _held.add(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(path)
        file.close()


def locked(folder: Path) -> IO[str]:
    """The lock file, locked, with this process's id in it."""
    path = folder / LOCK
    if path in _held:
        raise taken(folder, str(os.getpid()))
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")  # closed by `held`
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            by = file.read().strip()
            file.close()
            raise taken(folder, by) from None
        try:
            same = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except FileNotFoundError:
            same = False
        if same:  # not one that its holder has removed meanwhile
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()
