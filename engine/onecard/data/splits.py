"""Find the data files of a folder and the split of each, by the naming rules of `datasets`.

There are three rules. The first that matches any file is used for all files. Files that it does not match are ignored:

1. `data/NAME-00000-of-00002.*`
2. the folder's name: `train/a.csv`, `my-train/a.csv`
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
METADATA_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
README_HEADER = re.compile(r"\ufeff?---\s*\n(.*?\n)---", re.DOTALL)
README_CONFIG = re.compile(r"^(?:configs|dataset_info)\s*:", re.MULTILINE)


def data_files(folder: Path, suffixes: Sequence[str]) -> list[PurePosixPath]:
    """Files with these suffixes at any depth, sorted by path. Hidden files and metadata files are left out."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.name.lower().endswith(tuple(suffixes)))
    return sorted(
        (
            PurePosixPath(file.as_posix())
            for file in files
            if (folder / file).is_file()
            and file.name not in METADATA_FILES
            and not any(part.startswith(".") for part in file.parts)
            and not any(part.startswith("__") for part in file.parts[:-1])
        ),
        key=str,
    )


def has_loading_config(folder: Path) -> bool:
    """Whether the folder has its own loading configuration, as a dataset from the hub may have."""
    if (folder / ".huggingface.yaml").exists() or (folder / "dataset_infos.json").exists():
        return True
    readme = folder / "README.md"
    header = README_HEADER.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    return header is not None and README_CONFIG.search(header[1]) is not None


def files_by_split(files: Sequence[PurePosixPath]) -> dict[str, list[PurePosixPath]]:
    """Split -> its files; empty if no rule matches."""
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
    match = SHARD.fullmatch(str(file))
    return [match[1]] if match else []


def folder_splits(file: PurePosixPath) -> list[str]:
    return [name for name, pattern in FOLDER_NAMES.items() if any(map(pattern.fullmatch, file.parent.parts))]


def file_splits(file: PurePosixPath) -> list[str]:
    return [name for name, pattern in FILE_NAMES.items() if pattern.fullmatch(file.name)]
