"""A process that is killed between two of its file operations."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.move"}
KILLED = 137


def changes_files(event: str, arguments: tuple[object, ...], folder: Path) -> bool:
    """Whether an audit event is a change of a file below `folder`."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return writes and str(path).startswith(str(folder))
    return event in OPERATIONS and str(arguments[0]).startswith(str(folder))


def die_before(number: int, work: Callable[[], object], folder: Path) -> bool:
    """Do `work` in a child that dies just before its file operation `number`, from 0; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if changes_files(event, arguments, folder):
                if count == number:
                    os._exit(KILLED)
                count += 1

        code = 1
        try:
            sys.addaudithook(hook)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the work itself failed: {code}"
    return code == KILLED
