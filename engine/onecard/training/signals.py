"""Ctrl-C and SIGTERM in training: finish the step, write a checkpoint, and print the command that resumes the run."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from onecard.utils.errors import Interrupted
from onecard.utils.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPLACED_FLAGS = ("--overwrite", "--fresh", "--resume")  # `next_command` removes them and adds --resume
_restores: list[Callable[[], None]] = []  # restore the signal handlers of the `stop_requests` that are open
_forking = threading.local()


def block_signals() -> None:
    """Before a fork: block the signals, so that the child gets none before `restore_in_child` has run."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def restore_mask() -> None:
    """After a fork, in the parent: unblock the signals."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def restore_in_child() -> None:
    """After a fork, in the child: restore the handlers from before the run, as `multiprocessing.Pool` sends SIGTERM."""
    for restore in reversed(_restores):
        restore()
    _restores.clear()
    restore_mask()


os.register_at_fork(before=block_signals, after_in_parent=restore_mask, after_in_child=restore_in_child)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl-C or SIGTERM makes the yielded function return True; the second acts as usual.

    Only the main thread may set handlers: in another thread the function always returns False. A signal that the
    process ignores is still ignored (SIGINT, if a script started it in the background).
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        restore()
        say("stopping after this step, with a checkpoint. A second Ctrl-C stops at once; the last checkpoint remains.")

    for number in before:
        signal.signal(number, handle)
    _restores.append(restore)
    try:
        yield lambda: bool(received)
    finally:
        _restores.remove(restore)
        restore()


def interrupted(saved: Path) -> Interrupted:
    """The exception to raise once `saved` is written."""
    return Interrupted(f"stopped; the run up to this step is saved in {saved}. Resume with: {next_command(sys.argv)}")


def next_command(arguments: list[str]) -> str:
    """The command line that resumes the run of the given one."""
    name, *words = [Path(arguments[0]).name, *(word for word in arguments[1:] if word not in REPLACED_FLAGS)]
    onecard = ["python", "-m", "onecard"] if name == "__main__.py" else [name]
    return shlex.join([*onecard, *words, *([] if words[:1] == ["demo"] else ["--resume"])])  # the demo always continues
