"""The results of `onecard evaluate`, as a table in the terminal and as files."""

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
from onecard.utils.errors import escape_controls
from onecard.utils.files import digest, replace_folder

RESULTS = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    `metrics`: "policy" or "baseline" -> name -> estimate; `win_rate`: over the baseline, or None; `samples`: a row for
    each prompt.
    """

    config: EvaluateConfig
    prompts: int
    metrics: dict[str, dict[str, Estimate]]
    win_rate: WinRate | None
    samples: list[dict[str, Any]]


def table_cells(evaluation: Evaluation) -> list[list[str]]:
    """The cells of the table: a header row, then a row for each metric of the policy."""
    models = list(evaluation.metrics)  # "policy", "baseline"
    lines = [["", *models]]
    for name in evaluation.metrics["policy"]:
        lines.append([name, *(str(evaluation.metrics[model].get(name, "")) for model in models)])
    return lines


def summary_line(evaluation: Evaluation) -> str:
    """The line below the table: the number of prompts, and the win rate if there is a baseline."""
    prompts = f"{evaluation.prompts} prompts, mean ± standard error."
    return f"{prompts} Win rate over the baseline: {evaluation.win_rate}." if evaluation.win_rate else prompts


def print_table(evaluation: Evaluation) -> None:
    """Print the table and the line below it on standard output."""
    head, *lines = table_cells(evaluation)
    table = Table(*head)
    for line in lines:
        table.add_row(*map(escape_controls, line))
    out = Console(highlight=False, markup=False)
    out.print(table)
    out.print(escape_controls(summary_line(evaluation)), soft_wrap=True)


def markdown(evaluation: Evaluation) -> str:
    """The table as Markdown, with a title that names the models and the dataset."""
    head, *lines = ["| " + " | ".join(line) + " |" for line in table_cells(evaluation)]
    baseline = f", compared with `{evaluation.config.baseline}`" if evaluation.config.baseline else ""
    title = f"# `{evaluation.config.model}` on `{evaluation.config.dataset}`{baseline}"
    rule = "|" + " --- |" * len(table_cells(evaluation)[0])
    return "\n".join([title, "", head, rule, *lines, "", summary_line(evaluation), ""])


def write_files(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, `evaluation.md` and `samples.jsonl` into `folder`, atomically."""
    results = {
        "settings": asdict(evaluation.config),
        "prompts": evaluation.prompts,
        **{model: {name: asdict(value) for name, value in row.items()} for model, row in evaluation.metrics.items()},
        "win_rate": asdict(evaluation.win_rate) if evaluation.win_rate else None,
    }
    texts = {
        "evaluation.md": markdown(evaluation),
        "samples.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.samples),
    }
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    texts[RESULTS] = json.dumps({**results, "files": files}, indent=2) + "\n"

    def fill(temporary: Path) -> None:
        for name, text in texts.items():
            (temporary / name).write_bytes(text.encode())

    replace_folder(folder, fill)


def replaceable_files(folder: Path) -> tuple[str, ...]:
    """The unchanged files of an earlier evaluation in a folder, which a new evaluation may replace."""
    try:
        files = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["files"]
        regular = [name for name in (RESULTS, *files) if not (folder / name).is_symlink()]
        return tuple(name for name in regular if name == RESULTS or digest(folder / name) == files[name])
    except (OSError, ValueError, KeyError, TypeError):
        return ()
