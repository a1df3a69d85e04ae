"""Environment variables for the threads of tokenizers and OpenMP. Imports neither library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

TOKENIZERS = "TOKENIZERS_PARALLELISM"
_may_tokenize_in_parallel = False


def configure() -> None:
    """Set environment variables that are not set yet. Call it before torch is imported."""
    global _may_tokenize_in_parallel
    if TOKENIZERS not in os.environ:
        # A worker process that a reward function forks has no threads of the library, and would wait for them.
        os.environ[TOKENIZERS] = "false"
        _may_tokenize_in_parallel = not _is_forked
    # A waiting thread spins for some microseconds, then sleeps. With libgomp's default of milliseconds, a small model
    # is four times slower while another process uses a core; without spinning, it is a quarter slower on quiet cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "600")


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Context in which the tokenizers library uses all cores.

    It has no effect if the user set TOKENIZERS_PARALLELISM, or in a forked process, which would wait for threads that
    only its parent has.
    """
    if not _may_tokenize_in_parallel:
        yield
        return
    os.environ[TOKENIZERS] = "true"
    try:
        yield
    finally:
        os.environ[TOKENIZERS] = "false"


_is_forked = False


def _after_fork() -> None:
    global _is_forked, _may_tokenize_in_parallel
    _is_forked, _may_tokenize_in_parallel = True, False


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
