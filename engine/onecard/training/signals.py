"""Ctrl-C and SIGTERM: the current step is finished, a checkpoint is written, and the command to resume is printed."""

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
STARTS_ANEW = ("--overwrite", "--fresh", "--resume")
_restores: list[Callable[[], None]] = []  # of the `stop_requests` that are open
_forking = threading.local()


def block_signals() -> None:
    """Before a fork: block the signals, so that one sent to the child stays pending until its handlers are restored."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def restore_mask() -> None:
    """After a fork, in the parent: unblock the signals."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def restore_in_child() -> None:
    """After a fork, in the child: signals act as they did before the run. `multiprocessing.Pool` sends SIGTERM."""
    for restore in reversed(_restores):
        restore()
    _restores.clear()
    restore_mask()


os.register_at_fork(before=block_signals, after_in_parent=restore_mask, after_in_child=restore_in_child)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl-C or SIGTERM makes the yielded function return True; the second acts as usual.

    Signals belong to the main thread: elsewhere nothing is changed, and the function stays false. A signal that is
    ignored, as Ctrl-C is in what a script runs in the background, stays so.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    found = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        restore()
        say("stopping after this step, with a checkpoint. A second Ctrl-C stops at once; the last checkpoint remains.")

    for number in before:
        signal.signal(number, ask)
    _restores.append(restore)
    try:
        yield lambda: bool(asked)
    finally:
        _restores.remove(restore)
        restore()


def interrupted(saved: Path) -> Interrupted:
    """The exception to raise once `saved` is written."""
    return Interrupted(f"stopped; everything up to here is in {saved}. Go on with: {next_command(sys.argv)}")


def next_command(arguments: list[str]) -> str:
    """The given command line with --resume."""
    name, *words = [Path(arguments[0]).name, *(word for word in arguments[1:] if word not in STARTS_ANEW)]
    onecard = ["python", "-m", "onecard"] if name == "__main__.py" else [name]
    return shlex.join([*onecard, *words, *([] if words[:1] == ["demo"] else ["--resume"])])  # the demo always goes on
