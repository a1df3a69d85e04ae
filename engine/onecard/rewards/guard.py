"""A context for user code that restores the process state which the code may change.

Restored: the random states of Python, NumPy and torch; gradient mode, default dtype and device, number of threads;
working directory, recursion limit, standard streams, signal handlers and `os._exit`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from onecard.utils.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@contextmanager
def guarded(seed: int) -> Iterator[None]:
    """Context for user code: the random states are seeded with `seed`; the state listed above is restored at exit.

    In this process `os._exit` raises SystemExit, because it would end the run without a message. In forked workers it
    works as usual.
    """
    process, real_exit = os.getpid(), os._exit

    def raise_exit(code: int) -> None:
        if os.getpid() != process:
            real_exit(code)
        raise SystemExit(f"os._exit({code})")

    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    gradients, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    threads, limit, folder = torch.get_num_threads(), sys.getrecursionlimit(), os.getcwd()
    streams = sys.stdin, sys.stdout, sys.stderr
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    os._exit = raise_exit  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = real_exit
        sys.stdin, sys.stdout, sys.stderr = streams
        os.chdir(folder)
        sys.setrecursionlimit(limit)
        torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        torch.set_rng_state(states[2])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[0])
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def warn_when_slow(name: str, seconds: float) -> Iterator[None]:
    """Context that prints a warning about `name` if the code inside takes longer than `seconds` seconds; 0: never."""
    if not seconds:
        yield
        return
    message = f"{name} has been running for {seconds:g} s. Press Ctrl-C twice to end the run at its last checkpoint."
    timer = threading.Timer(seconds, say, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def describe_error(error: BaseException) -> str:
    """`ValueError: its message`, at most 200 characters of the message; the type alone if there is none."""
    try:
        text = str(error).strip()
    except Exception:  # `__str__` may raise anything
        text = ""
    return f"{type(error).__name__}: {truncated(text, 200)}" if text else type(error).__name__


def truncated(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def short_repr(value: Any, length: int) -> str:
    """`repr` of a value on one line, at most `length` characters; `repr` may fail, e.g. for very large integers."""
    try:
        return truncated(" ".join(repr(value).split()), length)
    except Exception:  # `__repr__` may raise anything
        return "a value without a repr"
