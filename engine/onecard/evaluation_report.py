"""What `onecard evaluate` found: as a table in the terminal, and as files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onecard.checkpoint import replace_folder
from onecard.config import EvaluateConfig
from onecard.measures import Estimate, WinRate

FILES = ("evaluation.json", "evaluation.md", "samples.jsonl")


@dataclass(frozen=True)
class Evaluation:
    """Measures of the policy, and of the baseline if there is one, by name; and a row for each prompt."""

    config: EvaluateConfig
    prompts: int
    measures: dict[str, dict[str, Estimate]]
    win_rate: WinRate | None
    samples: list[dict[str, Any]]


def cells(found: Evaluation) -> list[list[str]]:
    """The table: a header, then a line for each measure that the policy has."""
    sides = list(found.measures)
    lines = [["", *sides]]
    for name in found.measures["policy"]:
        lines.append([name, *(str(found.measures[side].get(name, "")) for side in sides)])
    return lines


def words(found: Evaluation) -> str:
    """The line below the table."""
    counted = f"{found.prompts} prompts, mean ± standard error."
    return f"{counted} Win rate over the baseline: {found.win_rate}." if found.win_rate else counted


def show(found: Evaluation) -> None:
    """The table on standard output."""
    head, *lines = cells(found)
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    out = Console(highlight=False, markup=False)
    out.print(table)
    out.print(words(found), soft_wrap=True)


def markdown(found: Evaluation) -> str:
    """The same table, with what was compared."""
    head, *lines = ["| " + " | ".join(line) + " |" for line in cells(found)]
    baseline = f", compared with `{found.config.baseline}`" if found.config.baseline else ""
    title = f"# `{found.config.model}` on `{found.config.dataset}`{baseline}"
    rule = "|" + " --- |" * len(cells(found)[0])
    return "\n".join([title, "", head, rule, *lines, "", words(found), ""])


def write(found: Evaluation, folder: Path) -> None:
    """All numbers and settings, the table, and the answers: whole or not at all."""
    numbers = {
        "settings": asdict(found.config),
        "prompts": found.prompts,
        **{side: {name: asdict(value) for name, value in row.items()} for side, row in found.measures.items()},
        "win_rate": asdict(found.win_rate) if found.win_rate else None,
    }
    texts = {
        "evaluation.json": json.dumps(numbers, indent=2) + "\n",
        "evaluation.md": markdown(found),
        "samples.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.samples),
    }

    def fill(temporary: Path) -> None:
        for name in FILES:
            (temporary / name).write_text(texts[name], encoding="utf-8")

    replace_folder(folder, fill)
