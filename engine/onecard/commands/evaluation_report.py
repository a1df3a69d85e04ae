"""What `onecard evaluate` found: as a table in the terminal, and as files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onecard.commands.statistics import Estimate, WinRate
from onecard.config import EvaluateConfig
from onecard.utils.errors import visible
from onecard.utils.files import digest, replace_folder

NUMBERS = "evaluation.json"


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
        table.add_row(*map(visible, line))
    out = Console(highlight=False, markup=False)
    out.print(table)
    out.print(visible(words(found)), soft_wrap=True)


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
        "evaluation.md": markdown(found),
        "samples.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.samples),
    }
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    texts[NUMBERS] = json.dumps({**numbers, "files": files}, indent=2) + "\n"

    def fill(temporary: Path) -> None:
        for name, text in texts.items():
            (temporary / name).write_bytes(text.encode())

    replace_folder(folder, fill)


def written_before(folder: Path) -> tuple[str, ...]:
    """The files of an earlier evaluation in a folder, as they were written: what a new one may replace."""
    try:
        files = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))["files"]
        plain = [name for name in (NUMBERS, *files) if not (folder / name).is_symlink()]
        return tuple(name for name in plain if name == NUMBERS or digest(folder / name) == files[name])
    except (OSError, ValueError, KeyError, TypeError):
        return ()
