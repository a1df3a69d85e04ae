"""`python -m benchmarks.will_it_fit`: the table model x algorithm x card, each cell planned by `onecard fit`.

Three sets of settings are planned for each model and algorithm, the fastest first; a cell names the first that the card
holds, and what it takes of the card. A cell is marked where the training step of that model was also measured on a GPU
under a cap of that card (`python -m benchmarks.train_step --device cuda`). The plans go into one JSON file, the table
into README.md between its markers.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks import cli, records
from benchmarks.render import update
from onecard.commands.fit.cards import GIB, Card
from onecard.commands.fit.command import as_json
from onecard.commands.fit.result import plan_and_search
from onecard.config import Algorithm, DPOConfig, FitConfig, PPOConfig, SFTConfig, TrainConfig
from onecard.utils.progress import progress

PLANS = records.RESULTS / "plan" / "will-it-fit.json"
README = records.ROOT / "README.md"
NAME = "will-it-fit"

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Gemma-2-2B", "Qwen3-4B", "Qwen2.5-7B", "Llama-3.1-8B", "Qwen2.5-14B")
ALGORITHMS: dict[Algorithm, type[TrainConfig]] = {"sft": SFTConfig, "dpo": DPOConfig, "ppo": PPOConfig}
CARDS = (8, 12, 16, 24, 32)
PROMPT = RESPONSE = 512
TOGETHER: dict[str, Any] = {"optim": "paged_adamw_8bit", "max_length": PROMPT + RESPONSE}
# by name, the fastest first: what is added to the settings before
LEVELS: dict[str, dict[str, Any]] = {
    "16 bit": {"gradient_checkpointing": True, "micro_batch_tokens": 2 * (PROMPT + RESPONSE)},
    "4 bit": {"load_in_4bit": True},
    "least": {"micro_batch_tokens": PROMPT + RESPONSE, "adapter_dtype": "bfloat16"},
}
GIB_OF_CELL = re.compile(r"\d+\.\d")
ROLLOUT = {"16 bit": 8, "4 bit": 8, "least": 1}


def settings_of(algorithm: Algorithm, model: str, level: str) -> TrainConfig:
    """The settings of a level; PPO has a reward adapter beside policy and critic."""
    config = ALGORITHMS[algorithm](model=model, **TOGETHER)
    for name, changes in LEVELS.items():
        config = replace(config, **changes)
        if name == level:
            break
    if isinstance(config, PPOConfig):
        rollout = {"local_rollout_forward_batch_size": ROLLOUT[level], "response_length": RESPONSE}
        config = replace(config, **rollout, reward_model_path="runs/reward")
    return config


def plan(algorithm: Algorithm, model: str, level: str) -> dict[str, Any]:
    """One plan as plain data."""
    config = settings_of(algorithm, model, level)
    fit = FitConfig(algorithm=algorithm, prompt_length=PROMPT, response_length=RESPONSE)
    return {"level": level, **as_json(plan_and_search(fit, config))}


def needed(row: Mapping[str, Any], card: int) -> float | None:
    """GiB that a plan takes of a card, context and fragmentation included; None where that is more than it has."""
    held = Card(f"{card} GB", card * GIB)
    peak = int(row["peak_gib"] * GIB)
    return held.needed(peak) / GIB if held.holds(peak) else None


Marks = set[tuple[str, str, int, bool]]


def measured(folder: Path) -> Marks:
    """(model, algorithm, card, base in 4 bit) of training steps that ran on a GPU under the cap of a card."""
    found = set()
    for path in sorted(folder.glob("*/train-step*.json")):
        for case in records.load(path).cases:
            ran = any(row.role == "ours" and row.seconds for row in case.rows)
            cap = case.about["cap_gib"]
            if ran and cap and not case.refused:
                card = next((card for card in CARDS if cap <= card), None)
                if card is not None:
                    found.add((case.about["model"], case.what, card, case.about["settings"]["load_in_4bit"]))
    return found


def cell(rows: Sequence[Mapping[str, Any]], card: int, marks: Marks) -> str:
    """The first level that fits, and its GiB."""
    for row in rows:
        gib = needed(row, card)
        if gib is not None:
            measured_too = (row["model"], row["algorithm"], card, row["level"] != "16 bit") in marks
            return f"{row['level']} {gib:.1f}" + (" ✓" if measured_too else "")
    return "–"


def table(plans: Mapping[str, Any], marks: Marks) -> str:
    """The Markdown table of a file of plans. Algorithms with the same settings on every card share a row; its GiB are
    the largest of theirs.
    """
    heads = [f"{card} GB" for card in CARDS]
    lines = [f"| model | | {' | '.join(heads)} |", f"|---|---|{'---|' * len(CARDS)}"]
    for model in MODELS:
        rows_with: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(dict)  # settings -> algorithm -> cells
        for algorithm in ALGORITHMS:
            rows = [row for row in plans["rows"] if (row["model"], row["algorithm"]) == (model, algorithm)]
            cells = [cell(rows, card, marks) for card in CARDS]
            rows_with[tuple(GIB_OF_CELL.sub("", each) for each in cells)][algorithm] = cells
        for index, found in enumerate(rows_with.values()):
            largest = [
                max(cells, key=lambda each: [float(gib) for gib in GIB_OF_CELL.findall(each)])
                for cells in zip(*found.values(), strict=True)
            ]
            lines.append(f"| {'' if index else model} | {', '.join(found)} | {' | '.join(largest)} |")
    dirty = " with changes" if plans["dirty"] else ""
    lines += ["", f"GiB of the card. Plans of commit {plans['commit'][:7]}{dirty}: `python -m benchmarks.will_it_fit`."]
    return "\n".join(lines)


@click.command(context_settings=cli.SETTINGS)
@click.option("--out", type=click.Path(path_type=Path), default=PLANS, help="The file of plans.")
@click.option("--readme", type=click.Path(path_type=Path), default=README, help="Where the table goes.")
@click.option("--render", is_flag=True, help="Only make the table again, from the file of plans.")
def command(out: Path, readme: Path, render: bool) -> None:
    """Plan every cell (a few minutes on two cores, no GPU), and put the table into README.md."""
    if not render:
        commit, dirty = records.commit()
        rows, todo = [], list(product(MODELS, ALGORITHMS, LEVELS))
        with progress("plan", len(todo)) as bar:
            for model, algorithm, level in todo:
                rows.append(plan(algorithm, model, level))
                bar.advance()
        found = {"commit": commit, "dirty": dirty, "versions": records.versions(), "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        records.write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    plans = json.loads(out.read_text(encoding="utf-8"))
    update(readme, {NAME: table(plans, measured(records.RESULTS))})


if __name__ == "__main__":
    sys.exit(cli.main(command))
