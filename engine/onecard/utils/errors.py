"""The exceptions that a person is meant to read, and text as a terminal may show it."""

import difflib
import unicodedata
from collections.abc import Iterable

# Unicode categories of characters that act on a terminal, end a line (of a YAML comment too), or change text direction.
CONTROLS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # which scripts and emoji are written with


def visible(text: str, kept: str = "\n\t") -> str:
    r"""Replace control characters but those in `kept` by escapes (`\x1b`), so that data does not act on a terminal.

    >>> visible("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in CONTROLS and letter not in kept and letter not in JOINERS
        else letter
        for letter in text
    )


class OnecardError(Exception):
    """Something the user can put right. The command line prints it as one line and exits with code 2.

    The message names the thing, what came, and what was expected; it never contains a line break, or another control
    character.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(message.split())))


class Interrupted(Exception):
    """A run that somebody stopped, where it can go on. The message says how; the command line exits with code 130."""


# What torch, the CUDA driver, Triton, cuBLAS and torch's allocator on a CPU write, in lower case.
NO_MEMORY = ("out of memory", "cublas_status_alloc_failed", "defaultcpuallocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left; such errors are all RuntimeErrors."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error).lower() for words in NO_MEMORY)


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def reason(error: Exception) -> str:
    """The first line of a library's message, or two where the first only announces: the rest is advice."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:300]
