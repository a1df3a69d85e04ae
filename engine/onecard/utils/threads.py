"""Threads of the libraries that a command uses. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

TOKENIZERS = "TOKENIZERS_PARALLELISM"
_may_tokenize_in_parallel = False


def configure() -> None:
    """Set the environment of a command. Variables that are set already stay. Call it before torch is imported."""
    global _may_tokenize_in_parallel
    if TOKENIZERS not in os.environ:
        # Off, for forked workers of a reward function do not have the library's threads and would wait for them.
        os.environ[TOKENIZERS] = "false"
        _may_tokenize_in_parallel = not _is_forked
    # Threads that wait for one another sleep: spinning, they slow a small model tenfold beside another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Context in which the tokenizers library uses all cores, unless the user's environment decides.

    A forked process does not: it would wait for threads that only its parent has.
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
