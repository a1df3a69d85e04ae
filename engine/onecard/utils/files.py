"""Files and folders that are whole or not there, and the removal of files by name.

Temporary names carry the process id: `.policy.4711.tmp` becomes `policy`, and what it replaces is `.policy.4711.old`
until then.
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
    """SHA-256 of a file, read in pieces."""
    state = hashlib.sha256()
    for block in blocks(path):
        state.update(block)
    return state.hexdigest()


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path, kind: str) -> Path:
    """A name beside `path` that no other process uses; `kind` is tmp or old."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def recover(target: Path) -> None:
    """Undo what killed processes have left of a replacement of `target`."""
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.*")):
        found = TEMPORARY.fullmatch(path.name)
        if found is None or found["name"] != target.name or is_alive(int(found["pid"])):
            continue
        if found["kind"] == "old" and not os.path.lexists(target):
            os.replace(path, target)
        else:
            remove(path)


def is_alive(process: int) -> bool:
    """Whether there is a process of that id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary folder beside `target`, then put it in target's place."""
    recover(target)
    new, old = temporary(target, "tmp"), temporary(target, "old")
    remove(new)
    new.mkdir(parents=True)
    try:
        write(new)
        for path in new.rglob("*"):
            sync(path)
        sync(new)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
        sync(target.parent)
        remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk looks like from Python, torch and Rust
        put_back(target, new, old)
        raise OnecardError(f"{target}: cannot be written ({error}); what was there before is unchanged.") from error
    except BaseException:
        put_back(target, new, old)
        raise


def put_back(target: Path, new: Path, old: Path) -> None:
    """Undo a replacement that has failed."""
    remove(new)
    if old.exists() and not target.exists():
        os.replace(old, target)


def remove(path: Path) -> None:
    """Remove a temporary file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    new = temporary(path, "tmp")
    try:
        new.write_text(text, encoding="utf-8")
        sync(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def listing(folder: Path) -> list[str]:
    """Names of all files and links in a folder and below it."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove the named files of a folder, and the folders that are empty then, itself among them."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    below = sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for path in (*below, folder):
        if path.exists() and not any(path.iterdir()):
            path.rmdir()


def set_aside(path: Path) -> Path:
    """Rename `checkpoint-8` to `checkpoint-8.damaged`, or to `checkpoint-8.damaged-2` where that is taken."""
    names = (f"{path.name}.damaged{f'-{count}' if count > 1 else ''}" for count in range(1, 10_000))
    free = next(aside for name in names if not os.path.lexists(aside := path.with_name(name)))
    os.replace(path, free)
    return free
