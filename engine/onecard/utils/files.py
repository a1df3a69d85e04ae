"""Atomic writes of files and folders, and removal of files by name.

Temporary names contain the process id: `.policy.4711.tmp` is filled, then renamed to `policy`. An earlier `policy` is
called `.policy.4711.old` until the replacement is finished.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from onecard.utils.errors import OnecardError

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>tmp|old)")


def cache_folder() -> Path:
    """`$ONECARD_CACHE`, or `~/.cache/onecard`."""
    return Path(os.environ.get("ONECARD_CACHE") or "~/.cache/onecard").expanduser()


def digest(path: Path) -> str:
    """SHA-256 of a file as a hex string."""
    state = hashlib.sha256()
    for block in blocks(path):
        state.update(block)
    return state.hexdigest()


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in blocks of 1 MiB."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def fsync(path: Path) -> None:
    """`fsync` a file or the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path, kind: str) -> Path:
    """The temporary name of `path` in this process, in the same folder; `kind` is tmp or old."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def recover(target: Path) -> None:
    """Clean up after killed processes: remove their temporary files, and restore `target` if it was moved away."""
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.*")):
        match = TEMPORARY.fullmatch(path.name)
        if match is None or match["name"] != target.name or is_alive(int(match["pid"])):
            continue
        if match["kind"] == "old" and not os.path.lexists(target):
            os.replace(path, target)
        else:
            remove(path)


def is_alive(process: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        pass
    return True


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace `target` atomically: `write` fills a temporary folder, which is then renamed to `target`.

    If writing fails, `target` is unchanged; a full disk raises `OnecardError`.
    """
    recover(target)
    new, old = temporary_path(target, "tmp"), temporary_path(target, "old")
    remove(new)
    new.mkdir(parents=True)
    try:
        write(new)
        for path in new.rglob("*"):
            fsync(path)
        fsync(new)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
        fsync(target.parent)
        remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # Python, torch and safetensors report a full disk so
        restore(target, new, old)
        raise OnecardError(f"{target}: cannot be written ({error}). Its earlier content is unchanged.") from error
    except BaseException:
        restore(target, new, old)
        raise


def restore(target: Path, new: Path, old: Path) -> None:
    """Undo a failed replacement: remove `new`, and rename `old` back to `target`."""
    remove(new)
    if old.exists() and not target.exists():
        os.replace(old, target)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, as UTF-8."""
    new = temporary_path(path, "tmp")
    try:
        new.write_text(text, encoding="utf-8")
        fsync(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def list_files(folder: Path) -> list[str]:
    """Sorted relative paths of all files and links in a folder and its subfolders."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove the named files of a folder, then all empty subfolders, and the folder itself if it is empty."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    subfolders = sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for path in (*subfolders, folder):
        if path.exists() and not any(path.iterdir()):
            path.rmdir()


def mark_damaged(path: Path) -> Path:
    """Rename `checkpoint-8` to `checkpoint-8.damaged`, or to `checkpoint-8.damaged-2` if that exists.

    Returns the new path.
    """
    names = (f"{path.name}.damaged{f'-{count}' if count > 1 else ''}" for count in range(1, 10_000))
    new_path = next(new for name in names if not os.path.lexists(new := path.with_name(name)))
    os.replace(path, new_path)
    return new_path
