"""The data of the learning table: what lies beside the repository, and rows made from it."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import records

# Relative to the repository, where every run is started: a command reads the same on any machine.
SHARED = "../shared/data"
MODELS = f"{SHARED}/models"
STORIES = f"{SHARED}/text/tinystories.jsonl"
POLITENESS = f"{SHARED}/prefs/rasbt_politeness.jsonl"
MADE = "runs/results-data"
JOY, LABELLED = f"{MADE}/joy.jsonl", f"{MADE}/labelled.jsonl"
SST2_TRAIN, SST2_HELDOUT = f"{MADE}/sst2-train.jsonl", f"{MADE}/sst2-dev.jsonl"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    records.write_atomically(path, text.encode())


def joy(path: Path) -> None:
    """Beginnings of stories, as docs/ppo.md has them."""
    example = records.ROOT / "docs" / "examples" / "joy.py"
    spec = importlib.util.spec_from_file_location("joy", example)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.data(str(records.ROOT / STORIES), str(path))


def labelled(path: Path) -> None:
    """One answer of each pair, the better and the worse in turns, with a label."""
    pairs = [json.loads(line) for line in (records.ROOT / POLITENESS).read_text(encoding="utf-8").splitlines()]
    write_rows(
        path,
        (
            {
                "prompt": pair["prompt"],
                "completion": pair["rejected" if place % 2 else "chosen"],
                "label": not place % 2,
            }
            for place, pair in enumerate(pairs)
        ),
    )


def sentiment(part: str) -> Callable[[Path], None]:
    """Sentences of SST-2; the score is 1 for a positive one, else 0."""

    def make(path: Path) -> None:
        source = records.ROOT / SHARED / "sentiment" / f"openai_{part}_binary_sent.csv"
        with open(source, encoding="utf-8", newline="") as file:
            rows = [
                {"prompt": "Review: ", "completion": row["sentence"], "score": float(row["label"])}
                for row in csv.DictReader(file)
            ]
        write_rows(path, rows)

    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    JOY: joy,
    LABELLED: labelled,
    SST2_TRAIN: sentiment("train"),
    SST2_HELDOUT: sentiment("dev"),
}


def make_data() -> None:
    """Write all of it anew; the same rows every time."""
    for name, make in MAKERS.items():
        path = records.ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
