"""`python -m benchmarks.scale`: time and memory of a start over many rows and of a long report, into docs/data.md."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks import cli, records, render
from benchmarks.records import Case, Recorder, Row
from onecard.commands.demo.tiny import make_tiny_model

PAGE = records.ROOT / "docs" / "data.md"
PROMPT_WORDS, ANSWER_WORDS = 30, 44  # with which 200,000 pairs are about 156 MiB
METRICS = 24
REPORT = "import sys; from onecard.reporting import write_run_report; write_run_report(sys.argv[1])"
PEER = """
import sys, datasets, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
def tokenize(rows):
    both = {}
    for name in ("chosen", "rejected"):
        texts = [prompt + answer for prompt, answer in zip(rows["prompt"], rows[name])]
        both[name] = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    return {"prompt_ids": tokenizer(rows["prompt"])["input_ids"], **{f"{name}_ids": ids for name, ids in both.items()}}
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
print(len(rows.map(tokenize, batched=True, remove_columns=rows.column_names)))
"""


def words(count: int) -> list[str]:
    """Words of one to four syllables; the same each time."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "ai", "ou")]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count)]


def write_pairs(path: Path, count: int) -> None:
    draw, known = random.Random(1), words(3000)

    def text(length: int) -> str:
        return " ".join(draw.choices(known, k=length))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {
                "prompt": text(PROMPT_WORDS),
                "chosen": f" {text(ANSWER_WORDS)}",
                "rejected": f" {text(ANSWER_WORDS)}",
            }
            file.write(json.dumps(row) + "\n")


def write_metrics(path: Path, count: int) -> None:
    draw = random.Random(2)
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, count + 1):
            row = {f"metric/{name}": draw.gauss(0, 1) for name in range(METRICS)}
            file.write(json.dumps({"step": step, "loss": 1 / step, **row}) + "\n")


@dataclass(frozen=True)
class Process:
    """A command whose wall time and most resident memory are measured."""

    name: str
    role: str
    command: Sequence[str]
    environment: Mapping[str, str]

    def run(self) -> tuple[float, int]:
        """Run the command to its end: seconds, bytes."""
        with tempfile.TemporaryFile() as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                self.command, stdout=output, stderr=output, env={**os.environ, **self.environment}
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                output.seek(0)
                end = output.read().decode()[-400:]
                raise click.ClickException(f"{self.name}: exit code {process.returncode}: {end}")
        return seconds, usage.ru_maxrss << 10


def measure_case(rows: int, report_rows: int, rounds: int) -> Case:
    """All processes once in each round. Each round begins without caches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, model, run = folder / "pairs.jsonl", folder / "model", folder / "run"
        write_pairs(data, rows)
        make_tiny_model(model, words(3000), seed=0)
        run.mkdir()
        write_metrics(run / "metrics.jsonl", report_rows)
        (run / "config.yaml").write_text("{}\n", encoding="utf-8")
        caches = {
            "ONECARD_CACHE": str(folder / "caches" / "ours"),
            "HF_DATASETS_CACHE": str(folder / "caches" / "peer"),
        }
        size = f"{rows:,} pairs, {data.stat().st_size / 2**20:.0f} MiB of JSON lines"
        ours = [sys.executable, "-m", "onecard", "dpo", "--model", str(model), "--dataset", str(data), "--max_length",
                "256", "--output_dir", str(folder / "out"), "--dry_run"]  # fmt: skip
        peer = [sys.executable, "-c", PEER, str(data), str(model)]
        report = [sys.executable, "-c", REPORT, str(run)]
        processes = (
            Process(f"{size}: `onecard dpo --dry_run`", "ours", ours, caches),
            Process(f"{size}: `datasets`, `load_dataset` and `map` with `batched=True`", "peer", peer, caches),
            Process("the same, the second time: `onecard dpo --dry_run`", "ours", ours, caches),
            Process("the same, the second time: `datasets`", "peer", peer, caches),
            Process(f"the report of {report_rows:,} rows of {METRICS} metrics", "ours", report, {}),
        )
        found: list[list[tuple[float, int]]] = []
        for _ in range(rounds):
            shutil.rmtree(folder / "caches", ignore_errors=True)
            found.append([process.run() for process in processes])
    table = tuple(
        Row(process.name, process.role, seconds=tuple(s for s, _ in runs), peak_bytes=max(peak for _, peak in runs))
        for process, runs in zip(processes, zip(*found, strict=True), strict=True)
    )
    return Case("scale", "whole processes", {"rows": rows, "report_rows": report_rows}, "", rows=table)


@click.command(context_settings=cli.SETTINGS)
@click.option("--rows", type=click.IntRange(1), default=200_000, show_default=True, help="Pairs to tokenize.")
@click.option("--report_rows", type=click.IntRange(1), default=100_000, show_default=True, help="Rows of the report.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are shown.")
@cli.OUT
@cli.ONLY_PRINT
def command(rows: int, report_rows: int, rounds: int, out: Path | None, only_print: bool) -> None:
    """Time a start over many rows twice, `datasets` beside it, and the report of a long run (nine minutes)."""
    recorder = Recorder("scale", torch.device("cpu"), out=out)
    render.show(recorder, measure_case(rows, report_rows, rounds), Console())
    render.finish(recorder, page=None if only_print else PAGE)


if __name__ == "__main__":
    sys.exit(cli.main(command))
