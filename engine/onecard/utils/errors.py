"""Exceptions whose message is shown to the user, helpers for their messages, and escaping of text for a terminal."""

import difflib
import unicodedata
from collections.abc import Iterable

# Unicode categories of characters that control a terminal, end a line (also in a YAML comment) or change direction
CONTROLS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # not escaped: some scripts and emoji need them


def escape_controls(text: str, keep: str = "\n\t") -> str:
    r"""Replace control characters, except those in `keep`, by escapes (`\x1b`), so that data cannot control a terminal.

    >>> escape_controls("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in CONTROLS and letter not in keep and letter not in JOINERS
        else letter
        for letter in text
    )


class OnecardError(Exception):
    """An error that the user can correct. The command line prints it as one line and exits with code 2.

    The message names the setting or file, the value, and what was expected. Line breaks in it become spaces, and other
    control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape_controls(" ".join(message.split())))


class Interrupted(Exception):
    """An interrupted run that can be resumed. The message tells how. The command line exits with code 130."""


# Parts of out-of-memory messages, in lower case: of torch, the CUDA driver and Triton; cuBLAS; torch's CPU allocator
OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "defaultcpuallocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host is out of memory. All such errors are RuntimeErrors."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the name in `known` that is most similar to `name`; an empty string if none is."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def reason(error: Exception) -> str:
    """The first line of a library's error message, or the first two if the first ends with a colon; 300 characters."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:300]
