"""Kill commands at random places, resume them, and compare: `python -m tests.e2e.kills` prints the table.

Half of the kills come just before a file operation of the command, half at a random moment. A killed command is run
again: with `--resume` if its run exists, with `--overwrite` if its output exists.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from onecard import reporting
from onecard.commands import cli
from tests.e2e.ppo_material import GOOD, STOPS, WORDS, no_report, write_rows
from tests.engine.kill_points import changes_files
from tests.tiny import write_tiny_model

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A command. After a kill it is run again, with `resume_flag` if the path `where` exists.

    `resume_flag` None: the command does not replace its output, which is complete once it exists.
    """

    name: str
    words: tuple[str, ...]
    output: str  # below the folder that `{}` in the words stands for
    resume_flag: str | None
    where: str


@dataclass(frozen=True)
class Kill:
    """One kill. `between`: just before a file operation, else at a random moment; `phase`: the last file written."""

    command: str
    phase: str
    between: bool
    resumed_by: str
    equal: bool


def write_material(folder: Path) -> Path:
    """The model, the rows, and a reward adapter and an SFT adapter."""
    write_tiny_model(folder / "model")
    write_rows(folder / "prompts.jsonl", [{"prompt": f"the {WORDS[i % 6]} {i}", "solution": str(i)} for i in range(16)])
    answers = [{"prompt": f"the {word} {i}", "chosen": " good", "rejected": " bad"} for i in range(4) for word in WORDS]
    write_rows(folder / "pairs.jsonl", answers)
    write_rows(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in answers])
    labels = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2} for i, row in enumerate(answers)]
    write_rows(folder / "labels.jsonl", labels)
    (folder / "good.py").write_text(GOOD)
    return folder


def cases(material: Path) -> dict[str, Case]:
    model, often = f"--model {material / 'model'}", "--max_steps 4 --save_steps 1 --logging_steps 1 --eval_steps 2"
    small = f"{model} {often} --test_size 4 --learning_rate 1e-2 --per_device_train_batch_size 4"
    sampled = f"{small} --eval_sample_length 8"
    stop_strings = " ".join(f"--stop_token {token}" for token in STOPS)
    score = f"--reward_funcs {material / 'good.py'}:score"
    ppo = f"{score} --batch_size 8 --num_ppo_epochs 2 --response_length 8 {stop_strings}"
    adapter, prompts = f"--model {material / 'adapter' / 'policy'}", f"--dataset {material / 'prompts.jsonl'}"
    labels = f"--loss_type kto --dataset {material / 'labels.jsonl'}"
    commands: dict[str, tuple[str, str, str | None]] = {
        "sft": (f"sft {sampled} --dataset {material / 'sft.jsonl'} --output_dir {{}}/run", "run", "--resume"),
        "reward": (f"reward {small} --dataset {material / 'pairs.jsonl'} --output_dir {{}}/run", "run", "--resume"),
        "dpo": (f"dpo {sampled} --dataset {material / 'pairs.jsonl'} --output_dir {{}}/run", "run", "--resume"),
        "dpo, kto": (f"dpo {sampled} {labels} --output_dir {{}}/run", "run", "--resume"),
        "ppo": (f"ppo {small} {ppo} {prompts} --output_dir {{}}/run", "run", "--resume"),
        "merge": (f"merge {adapter} --output_dir {{}}/merged", "merged", None),
        "evaluate": (
            f"evaluate {adapter} {score} {prompts} --response_length 4 --output_dir {{}}/evaluation", "evaluation", "",
        ),
        "generate": (
            f"generate {adapter} {prompts} --max_new_tokens 4 --output {{}}/out.jsonl",
            "out.jsonl", "--overwrite",
        ),
    }  # fmt: skip
    return {
        name: Case(name, tuple(words.split()), output, flag, f"{output}/run.json" if flag == "--resume" else output)
        for name, (words, output, flag) in commands.items()
    }


class SharedProgress:
    """Memory shared with a child: the number of file operations that it began, and the file of the last one."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)

    def write(self, count: int, path: str) -> None:
        text = f"{count} {path}".encode()[:4000]
        self.memory[: len(text) + 1] = text + b"\0"

    def read(self) -> tuple[int, str]:
        count, _, path = bytes(self.memory).split(b"\0")[0].decode().partition(" ")
        return int(count or 0), path


def run(words: Sequence[str], folder: Path, *, before: int = -1, after: float = 0.0) -> tuple[int, int, str]:
    """A command in a child. It dies `before` a file operation (counted from 0) in `folder`, or `after` some seconds.

    Returns its exit code (-9: killed), how many operations it began, and the file of the last one.
    """
    progress = SharedProgress()
    child = os.fork()
    if child == 0:
        count, output = 0, os.open(folder.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if changes_files(event, arguments, folder):
                progress.write(count + 1, str(arguments[0]))
                if count == before:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(hook)
        code = 1
        try:
            cli.main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), *progress.read()


def phase_of(path: str, output: Path) -> str:
    """The phase of a command, by the file that it writes."""
    if not path:
        return "loading"
    name = Path(path).relative_to(output.parent).parts
    inner = name[1] if len(name) > 1 else name[0]
    inner = inner.lstrip(".").split(".")[0]
    return {"run": "start", "config": "start", "metrics": "steps"}.get(inner, inner.split("-")[0])


def result_of(output: Path) -> Result:
    """What a command writes, without times and memory."""
    found: Result = {}
    files = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]
    for path in files:
        name = path.relative_to(output.parent).as_posix()
        if path.name in ("metrics.jsonl", "samples.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]
        elif (path.suffix == ".safetensors" and "checkpoint-" not in name) or output.is_file() or path.suffix == ".md":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found.setdefault("files", []).append(name)
    return found


def kill_once(
    case: Case, whole: Result, operations: int, seconds: float, rng: random.Random, folder: Path, *, between: bool
) -> Kill:
    """Kill a command once and resume it. A command that ended before its kill is run again."""
    words = [word.format(folder) for word in case.words]
    while True:
        before, after = (rng.randrange(operations), 0.0) if between else (-1, rng.uniform(0.02, seconds))
        code, _, path = run(words, folder, before=before, after=after)
        if code == -signal.SIGKILL:
            break
        shutil.rmtree(folder)
        folder.mkdir()
    flag = case.resume_flag if (folder / case.where).exists() else ""
    code = 0 if flag is None else run([*words, *flag.split()], folder)[0]
    equal = code == 0 and result_of(folder / case.output) == whole
    shown = "nothing to do" if flag is None else flag or "the same command"
    return Kill(case.name, phase_of(path, folder / case.output), between, shown, equal)


def kill_all(
    count: int, seed: int, *, only: Sequence[str] = (), on_kill: Callable[[Kill], None] | None = None
) -> list[Kill]:
    """`count` kills, the commands in turns."""
    modules = [target.partition(":")[0] for _, target, _ in cli.COMMANDS.values()]
    for name in (*modules, "bitsandbytes", "peft"):  # here, so that no child has to
        importlib.import_module(name)
    rng, kills = random.Random(seed), list[Kill]()
    with tempfile.TemporaryDirectory() as name:
        material = write_material(Path(name) / "material")
        chosen = {each: case for each, case in cases(material).items() if not only or each in only}
        code, *_ = run(
            [word.format(material) for word in cases(material)["sft"].words[:-1]] + [str(material / "adapter")],
            material,
        )
        assert code == 0, (material.parent / "output.txt").read_text()
        whole: dict[str, tuple[Result, int, float]] = {}
        for each, case in chosen.items():
            folder = Path(name) / f"whole-{len(whole)}"
            folder.mkdir()
            began = time.perf_counter()
            code, operations, _ = run([word.format(folder) for word in case.words], folder)
            assert code == 0, (folder.parent / "output.txt").read_text()
            whole[each] = result_of(folder / case.output), operations, time.perf_counter() - began
        for number in range(count):
            each = list(chosen)[number % len(chosen)]
            folder = Path(name) / f"kill-{number}"
            folder.mkdir()
            between = (number + number // len(chosen)) % 2 == 0
            kills.append(kill_once(chosen[each], *whole[each], rng, folder, between=between))
            if on_kill:
                on_kill(kills[-1])
            elif not kills[-1].equal:
                raise AssertionError(f"{kills[-1]}: {(folder.parent / 'output.txt').read_text()[-2000:]}")
    return kills


def table(kills: Sequence[Kill]) -> str:
    """A row for each command."""
    lines = [
        "| command | kills | before a file operation | at a random moment | phases | equal to the uninterrupted run |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(kill.command for kill in kills):
        own = [kill for kill in kills if kill.command == name]
        between, equal = sum(kill.between for kill in own), sum(kill.equal for kill in own)
        phases: Mapping[str, int] = Counter(kill.phase for kill in own)
        shown = ", ".join(f"{phase} {count}" for phase, count in sorted(phases.items(), key=lambda item: -item[1]))
        lines.append(f"| {name} | {len(own)} | {between} | {len(own) - between} | {shown} | {equal} |")
    lines.append(f"| all | {len(kills)} | {sum(k.between for k in kills)} | {sum(not k.between for k in kills)} | | "
                 f"{sum(k.equal for k in kills)} |")  # fmt: skip
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--kills", "count", default=100, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option("--reports/--no_reports", default=True, show_default=True, help="Write plots and reporting.html too.")
def command(count: int, seed: int, reports: bool) -> None:
    """Kill every command at random places, resume it, and print how often the result was the same (a few minutes)."""
    if not reports:
        reporting.write_run_report = no_report
    kills = kill_all(count, seed, on_kill=lambda kill: click.echo(f"{kill}", err=True))
    click.echo(table(kills))
    sys.exit(0 if all(kill.equal for kill in kills) else 1)


if __name__ == "__main__":
    command()
