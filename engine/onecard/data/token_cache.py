"""The token cache: stores the tokenized examples of large datasets on disk, for later runs over the same rows.

$ONECARD_CACHE/tokens/KEY/
    tokens, response_mask, stops, firsts, numbers    the arrays (see `example_arrays.py`)
    groups                                           `Tokenized.groups`
    account.json                                     notes, bad rows, and the digests of the other files
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from onecard.data.data_report import BadRow, Tokenized
from onecard.data.example_arrays import DTYPES, Examples, open_examples
from onecard.data.files import Row, Rows
from onecard.data.templates import date_of
from onecard.data.tokens import Tokenizer
from onecard.utils.files import cache_folder, digest, recover, remove, temporary
from onecard.utils.progress import say

T = TypeVar("T")

GROUP_BYTES = 16
METADATA, GROUPS = "account.json", "groups"


@dataclass(frozen=True)
class TokenizedExamples(Tokenized[T]):
    """`Tokenized` with examples in arrays."""

    examples: Examples[T]


def cache_key(rows: Iterable[Row], tokenizer: Tokenizer, kind: type, settings: Mapping[str, Any]) -> str:
    """SHA-256 of everything the examples depend on; empty if they are not cached.

    Small data, rows without an identity (`Rows.identity`) and tokenizers written in Python are not cached.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(rows, Rows) or not rows.identity or backend is None:
        return ""
    import tokenizers
    import transformers

    template = str(tokenizer.chat_template or "")
    parts = {
        "rows": rows.identity,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "special tokens": [str(tokenizer.special_tokens_map), sorted(getattr(tokenizer, "generation_eos", ()))],
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "template": template,
        "date": date_of(template),
        "kind": kind.__name__,
        "settings": dict(settings),
        "code": code_digest(),
        "versions": [tokenizers.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 of the source files of `onecard.data`: another version may tokenize differently."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def cached(key: str, kind: type[T], write: Callable[[Path | None], TokenizedExamples[T]]) -> TokenizedExamples[T]:
    """Read the examples of `key` from the cache, or compute them with `write(folder)`, which writes them to the folder.

    `write(None)`, which keeps them in memory, is called if `key` is empty or the folder cannot be written.
    """
    if not key:
        return write(None)
    folder = cache_folder() / "tokens" / key
    tokenized = read_cache(folder, kind)
    if tokenized is not None:
        say(f"data: {len(tokenized.examples):,} tokenized examples are read from {folder}.")
        return tokenized
    new = temporary(folder, "tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder)
        remove(new)
        new.mkdir()
        tokenized = write(new)
        (new / GROUPS).write_bytes(b"".join(tokenized.groups))
        files = {name: digest(new / name) for name in (*DTYPES, GROUPS)}
        metadata = {"files": files, "notes": tokenized.notes, "bad_rows": [asdict(bad) for bad in tokenized.bad_rows]}
        (new / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
        remove(folder)
        os.replace(new, folder)
    except OSError as error:
        with suppress(OSError):
            remove(new)
        say(f"data: {folder} cannot be written ({error}); the examples are kept in memory and not cached.")
        return write(None)
    except BaseException:
        remove(new)
        raise
    return tokenized


def read_cache(folder: Path, kind: type[T]) -> TokenizedExamples[T] | None:
    """The examples in a folder of the cache; None if it does not exist or is damaged."""
    if not folder.exists():
        return None
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        damaged = next((name for name, sha in metadata["files"].items() if digest(folder / name) != sha), None)
        if damaged is not None:
            raise ValueError(f"the digest of {damaged} is wrong")
        groups = (folder / GROUPS).read_bytes()
        return TokenizedExamples(
            open_examples(kind, folder),
            [groups[start : start + GROUP_BYTES] for start in range(0, len(groups), GROUP_BYTES)],
            tuple(metadata["notes"]),
            tuple(BadRow(**bad) for bad in metadata["bad_rows"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"data: {folder} is damaged ({error}); the rows are tokenized again.")
        return None
