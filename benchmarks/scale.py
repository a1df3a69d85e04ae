"""`python -m benchmarks.scale`: time and memory of a start over many rows, and of the report of a long run."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import click
import torch

from benchmarks import cli, measure, render
from benchmarks.records import Case, Recorder, Row
from onecard.commands.demo.tiny import make_tiny_model

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
    lengths = {"prompt": PROMPT_WORDS, "chosen": ANSWER_WORDS, "rejected": ANSWER_WORDS}
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            texts = {name: " ".join(draw.choices(known, k=length)) for name, length in lengths.items()}
            row = {"prompt": texts["prompt"], "chosen": f" {texts['chosen']}", "rejected": f" {texts['rejected']}"}
            file.write(json.dumps(row) + "\n")


def write_metrics(path: Path, count: int) -> None:
    draw = random.Random(2)
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, count + 1):
            row = {f"metric/{name}": draw.gauss(0, 1) for name in range(METRICS)}
            file.write(json.dumps({"step": step, "loss": 1 / step, **row}) + "\n")


def measure_case(rows: int, report_rows: int, rounds: int) -> Case:
    """All processes once in each round. Each round begins without caches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, model, run, log = (folder / each for each in ("pairs.jsonl", "model", "run", "log"))
        write_pairs(data, rows)
        make_tiny_model(model, words(3000), seed=0)
        run.mkdir()
        write_metrics(run / "metrics.jsonl", report_rows)
        (run / "config.yaml").write_text("{}\n", encoding="utf-8")
        ours, theirs = folder / "caches" / "ours", folder / "caches" / "peer"
        environment = {"ONECARD_CACHE": str(ours), "HF_DATASETS_CACHE": str(theirs)}
        size = f"{rows:,} pairs, {data.stat().st_size / 2**20:.0f} MiB of JSON lines"
        start = ["-m", "onecard", "dpo", "--model", str(model), "--dataset", str(data)]
        start += ["--max_length", "256", "--output_dir", str(folder / "out"), "--dry_run"]
        peer = ["-c", PEER, str(data), str(model)]
        processes = {
            f"{size}: `onecard dpo --dry_run`": ("ours", start),
            f"{size}: `datasets`, `load_dataset` and `map` with `batched=True`": ("peer", peer),
            "the same, the second time: `onecard dpo --dry_run`": ("ours", start),
            "the same, the second time: `datasets`": ("peer", peer),
            f"the report of {report_rows:,} rows of {METRICS} metrics": ("ours", ["-c", REPORT, str(run)]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        peaks = dict.fromkeys(processes, 0)
        for _ in range(rounds):
            shutil.rmtree(folder / "caches", ignore_errors=True)
            for name, (_, arguments) in processes.items():
                code, taken, usage = measure.run_process([sys.executable, *arguments], log, environment)
                if code:
                    end = log.read_text(encoding="utf-8", errors="replace")[-400:]
                    raise click.ClickException(f"{name}: exit code {code}: {end}")
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], usage.ru_maxrss << 10)
    made = tuple(
        Row(name, role, seconds=tuple(seconds[name]), peak_bytes=peaks[name]) for name, (role, _) in processes.items()
    )
    return Case("scale", "whole processes", {"rows": rows, "report_rows": report_rows}, "", rows=made)


@click.command(context_settings=cli.SETTINGS)
@click.option("--rows", type=click.IntRange(1), default=200_000, show_default=True, help="Pairs to tokenize.")
@click.option("--report_rows", type=click.IntRange(1), default=100_000, show_default=True, help="Rows of the report.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are shown.")
@cli.OUT
def command(rows: int, report_rows: int, rounds: int, out: Path | None) -> None:
    """Time a start over many rows twice, `datasets` beside it, and the report of a long run (nine minutes)."""
    recorder = Recorder("scale", torch.device("cpu"), repeats=rounds, out=out)
    render.run(recorder, [rounds], lambda count, _: measure_case(rows, report_rows, count))


if __name__ == "__main__":
    sys.exit(cli.main(command))
