"""What the tests of `onecard ppo` share: a small run's settings, and how its folder is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onecard.commands import cli

WORDS = ["cat", "dog", "hen", "cow", "fox", "mat"]
STOPS = list("abcdefghijklmnopqrst")  # a random model seldom draws its one EOS; with these, answers end at every length
GOOD = """
def score(completions, **kwargs):
    return [len(set(text)) / 10 for text in completions]

def length(completion_ids, solution):
    return [len(ids) / 7 + int(value) / 100 for ids, value in zip(completion_ids, solution)]

not_a_function = 3
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(settings: dict[str, Any]) -> list[str]:
    """`{"--seed": 3, "--overwrite": True, "--stop_token": ["a", "b"], "--model": None}` as words; None is left out."""
    words = []
    for flag, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            words += [] if one is None else [flag] if one is True else [flag, str(one)]
    return words


def run_command(*words: object) -> None:
    """A command that has to work, from a fixture of the whole module."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert not stop.value.code


def no_report(folder: Path) -> Path:
    """In place of `write_run_report`, whose plots take longer than all the rest."""
    return folder / "report.html"


def settings(model: Path, material: Path, output_dir: Path) -> dict[str, Any]:
    """A small run with a reward function: 2 iterations of 8 responses."""
    return {
        "--model": model,
        "--dataset": material / "prompts.jsonl",
        "--output_dir": output_dir,
        "--reward_funcs": f"{material / 'good.py'}:score",
        "--test_size": 4,
        "--batch_size": 8,
        "--per_device_train_batch_size": 4,
        "--num_ppo_epochs": 2,
        "--response_length": 8,
        "--stop_token": STOPS,
        "--learning_rate": 1e-2,
        "--max_steps": 2,
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training_rows(folder: Path) -> list[dict[str, float]]:
    return [row for row in metrics(folder) if "loss" in row]


def all_finite(folder: Path) -> bool:
    return all(math.isfinite(value) for row in metrics(folder) for value in row.values())


def without_clock(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in metrics(folder)]


def same_policy(first: Path, second: Path) -> bool:
    """Whether two runs' adapters are the same, bit for bit."""
    a, b = (load_file(folder / "policy" / "adapter_model.safetensors") for folder in (first, second))
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def error_line(result: Any) -> str:
    """The one line of a refused command."""
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("onecard: error:")]
    assert len(lines) == 1
    assert result.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.err + result.out
    return lines[0]
