"""Which files of a folder are data, and of which split, by the names that `datasets` knows splits by.

Of three rules the first that fits any file holds for all of them; a file that it does not fit is left out:

1. `data/NAME-00000-of-00002.*`
2. a folder's name: `train/a.csv`, `my-train/a.csv`
3. the file's name: `train.csv`, `train_1.csv`, `a-test.csv`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
SHARD = re.compile(r"data/(.+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
BEFORE, AFTER = "(?:.*[-._ 0-9])?", "[-._ 0-9].*"
FOLDER_NAMES = {split: re.compile(f"{BEFORE}(?:{names})(?:{AFTER})?") for split, names in KEYWORDS.items()}
FILE_NAMES = {split: re.compile(f"{BEFORE}(?:{names}){AFTER}") for split, names in KEYWORDS.items()}
NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
CARD_HEADER = re.compile(r"\ufeff?---\s*\n(.*?\n)---", re.DOTALL)
CARD_SETTING = re.compile(r"^(?:configs|dataset_info)\s*:", re.MULTILINE)


def data_files(folder: Path, suffixes: Sequence[str]) -> list[PurePosixPath]:
    """Files with these endings at any depth, in the order of their names; none that are hidden."""
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.name.lower().endswith(tuple(suffixes)))
    return sorted(
        (
            PurePosixPath(file.as_posix())
            for file in found
            if (folder / file).is_file()
            and file.name not in NO_DATA
            and not any(part.startswith(".") for part in file.parts)
            and not any(part.startswith("__") for part in file.parts[:-1])
        ),
        key=str,
    )


def has_settings(folder: Path) -> bool:
    """Whether the folder says itself how it is to be read, as one from the hub may."""
    if (folder / ".huggingface.yaml").exists() or (folder / "dataset_infos.json").exists():
        return True
    card = folder / "README.md"
    header = CARD_HEADER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return header is not None and CARD_SETTING.search(header[1]) is not None


def files_by_split(files: Sequence[PurePosixPath]) -> dict[str, list[PurePosixPath]]:
    """The files of each split; empty where no name says one."""
    rules: tuple[Callable[[PurePosixPath], list[str]], ...] = (shard_split, folder_splits, file_splits)
    for rule in rules:
        splits: dict[str, list[PurePosixPath]] = {}
        for file in files:
            for split in rule(file):
                splits.setdefault(split, []).append(file)
        if splits:
            return splits
    return {}


def shard_split(file: PurePosixPath) -> list[str]:
    found = SHARD.fullmatch(str(file))
    return [found[1]] if found else []


def folder_splits(file: PurePosixPath) -> list[str]:
    return [name for name, known in FOLDER_NAMES.items() if any(known.fullmatch(part) for part in file.parent.parts)]


def file_splits(file: PurePosixPath) -> list[str]:
    return [name for name, known in FILE_NAMES.items() if known.fullmatch(file.name)]
