"""The exceptions that a person is meant to read."""

import difflib
from collections.abc import Iterable


class OnecardError(Exception):
    """Something the user can put right. The command line prints it as one line and exits with code 2.

    The message names the thing, what came, and what was expected; it never contains a line break.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Interrupted(Exception):
    """A run that somebody stopped, where it can go on. The message says how; the command line exits with code 130."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left: torch's name for it on a GPU, and its allocator's on a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
