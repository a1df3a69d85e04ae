"""300 random inputs, of which `make test` has 90: settings, data files, run folders and reward functions.

Each command ends with exit code 0, 2 or 130 and without a traceback, leaves no half-written file, and changes no file
that is not its own. A command that refuses changes no file at all.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from onecard.config import DPOConfig, EvaluateConfig, GenerateConfig, PPOConfig, RewardConfig, SFTConfig
from tests.e2e.ppo_material import STOPS

CONFIGS = {
    "sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig, "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}  # fmt: skip
TRAINING = ("sft", "reward", "dpo", "ppo")
LONGEST = 90  # seconds that one command may take
# Each kind of input is divided into ten tests, which workers share.
PARTS = [*range(3), *(pytest.param(part, marks=pytest.mark.grid) for part in range(3, 10))]

pytestmark = pytest.mark.usefixtures("quick")


def tree(folder: Path) -> dict[str, str]:
    """Every file, folder and link below a folder, with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


@contextmanager
def in_time() -> Iterator[None]:
    """A command that hangs fails."""

    def late(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"still running after {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Fuzz:
    """Runs commands in a folder that also holds files of somebody else."""

    def __init__(self, onecard: Callable[..., Any], folder: Path) -> None:
        self.onecard, self.folder = onecard, folder
        self.notes = folder / "notes"
        self.notes.mkdir()
        (self.notes / "mine.txt").write_text("mine")
        (self.notes / ".mine.tmp").write_text("mine")

    def run(self, *words: object, its_own: str = "") -> int:
        """Run a command, check what the top of this file says, and return its exit code.

        A command that fails may leave files whose names begin with `its_own`.
        """
        before = tree(self.folder)
        with in_time():
            result = self.onecard(*words)
        after, line = tree(self.folder), " ".join(map(str, words))
        assert result.code in (0, 2, 130), f"{line}\n{result.err}"
        assert "Traceback" not in result.err + result.out, f"{line}\n{result.err}"
        assert "\x1b]" not in result.err + result.out, line
        assert {name: after.get(name) for name in before if name.startswith("notes")} == {
            name: content for name, content in before.items() if name.startswith("notes")
        }, line
        half = [name for name in after if name.endswith((".tmp", ".old")) and name not in before]
        assert not half, f"{line}\n{half}"
        if result.code == 2:
            last = result.err.rstrip("\n").splitlines()[-1]
            assert last.startswith("onecard: error: "), f"{line}\n{result.err}"
            if its_own:
                before, after = (
                    {n: c for n, c in each.items() if not n.startswith(its_own)} for each in (before, after)
                )
            assert after == before, f"{line}\n{last}\n{set(after.items()) ^ set(before.items())}"
        return int(result.code)


@pytest.fixture
def fuzz(onecard: Callable[..., Any], tmp_path: Path) -> Fuzz:
    return Fuzz(onecard, tmp_path)


def words_of(command: str, model: Path, material: Path, folder: Path) -> dict[str, Any]:
    """Settings with which the command works, and is quick."""
    data = {"sft": "sft.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}.get(command, "prompts.jsonl")
    found: dict[str, Any] = {"model": model, "dataset": material / data}
    if command in TRAINING:
        found |= {"output_dir": folder / "run", "max_steps": 1, "test_size": 2, "per_device_train_batch_size": 2}
    if command in ("sft", "dpo"):
        found["eval_samples"] = 0
    if command == "ppo":
        found |= {"reward_funcs": f"{material / 'good.py'}:score", "batch_size": 4, "response_length": 4}
        found |= {"stop_token": STOPS, "num_ppo_epochs": 1}
    if command == "evaluate":
        found |= {"reward_funcs": f"{material / 'good.py'}:score", "response_length": 2, "output_dir": folder / "e"}
    if command == "generate":
        found |= {"max_new_tokens": 2, "output": folder / "out.jsonl"}
    return found


def flags(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return words


# --- settings

ODD: tuple[Any, ...] = (
    "-1", "nan", "inf", "-inf", "1e308", "-1e308", "1e-400", "1" + "0" * 400, "1.7", "true", "null", "[]", "{}", "",
    " ", "☃", "\x1b]0;title\x07", "a\u2028b", "../..", "/dev/null", "*", "0x10", "1_0", "٣", "1,5", "x" * 5000, "--",
    "\ud800",
)  # fmt: skip
ODD_YAML: tuple[Any, ...] = (
    -1, float("nan"), float("inf"), 1e308, 10**400, 1.7, True, None, [], {}, "", [1, [2]], {"a": 1}, "☃", [None], -0.0,
    "\x1b]0;title\x07", "a\u2028b", 2**64, "yes",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_settings(fuzz: Fuzz, tiny_model: Path, material: Path, part: int) -> None:
    draw = random.Random(f"settings {part}")
    for number in range(10):
        command = draw.choice(list(CONFIGS))
        settings = words_of(command, tiny_model, material, fuzz.folder)
        names = [each.name for each in fields(CONFIGS[command]) if each.name not in ("output_dir", "output")]
        odd = draw.sample(names, draw.randint(1, 2))
        if draw.random() < 0.5:
            words = flags({name: value for name, value in settings.items() if name not in odd})
            fuzz.run(command, *words, *(word for name in odd for word in (f"--{name}", draw.choice(ODD))))
        else:
            path = fuzz.folder / "notes" / f"{number}.yaml"
            path.write_text(yaml.safe_dump({name: draw.choice(ODD_YAML) for name in odd}, allow_unicode=True))
            fuzz.run(command, "--config", path, *flags({n: value for n, value in settings.items() if n not in odd}))
        for made in ("run", "e", "out.jsonl"):
            shutil.rmtree(fuzz.folder / made, ignore_errors=True)
            (fuzz.folder / "out.jsonl").unlink(missing_ok=True)


# --- data files

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"the cat {place}", "completion": " sat", "chosen": " good", "rejected": " bad", "score": place / 2,
        "text": "the dog", "solution": place, "margin": 0.5,
    }
    for place in range(8)
]  # fmt: skip
INSERTED = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b]0;title\x07", "\u2028".encode(), "\x85".encode(), b"NaN", b"1e999",
    b"\r",
    b"[" * 3000, b'{"a":', b'"', b",", b"\n\n", b"\xed\xa0\x80", b'"prompt": null, ', b"9" * 5000, b"\\ud800", b"<s>",
)  # fmt: skip


def content(kind: str) -> bytes:
    """The rows in a file of a kind."""
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if kind == "jsonl":
        return lines
    if kind == "json":
        return json.dumps(ROWS).encode()
    if kind == "jsonl.gz":
        return gzip.compress(lines, mtime=0)
    buffer = io.BytesIO()
    {"csv": table.to_csv, "parquet": table.to_parquet}[kind](buffer)
    return buffer.getvalue()


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes of a file changed, lost, doubled or put in."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(made) + 1)
        length = draw.choice((1, 1, 4, 40, 400))
        match draw.choice(("flip", "cut", "double", "insert", "end")):
            case "flip" if place < len(made):
                made[place] ^= 1 << draw.randrange(8)
            case "cut":
                del made[place : place + length]
            case "double":
                made[place:place] = made[place : place + length]
            case "insert":
                made[place:place] = draw.choice(INSERTED)
            case "end":
                del made[draw.randrange(len(made) + 1) :]
    return bytes(made)


@pytest.mark.parametrize("part", PARTS)
def test_data_files(fuzz: Fuzz, tiny_model: Path, material: Path, part: int) -> None:
    draw = random.Random(f"data {part}")
    for number in range(10):
        kind = draw.choice(("jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz"))
        path = fuzz.folder / "notes" / f"{number}.{kind}"
        path.write_bytes(damaged(content(kind), draw))
        command = draw.choice((*TRAINING, "generate"))
        settings = words_of(command, tiny_model, material, fuzz.folder) | {"dataset": path}
        settings |= {"dry_run": True} if command in TRAINING else {}
        settings |= {"skip_bad_rows": True} if command in TRAINING and draw.random() < 0.5 else {}
        fuzz.run(command, *flags(settings))
        (fuzz.folder / "out.jsonl").unlink(missing_ok=True)


# --- run folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, material: Path) -> Path:
    """A finished DPO run with two checkpoints."""
    from tests.e2e.ppo_material import run_command

    folder = tmp_path_factory.mktemp("finished")
    run_command("dpo", *flags(dpo_settings(tiny_model, material, folder / "run")))
    return folder / "run"


def dpo_settings(model: Path, material: Path, run: Path) -> dict[str, Any]:
    return {
        "model": model, "dataset": material / "pairs.jsonl", "output_dir": run, "max_steps": 2, "save_steps": 1,
        "test_size": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "eval_steps": 1, "eval_samples": 0,
    }  # fmt: skip


def damage_folder(run: Path, notes: Path, draw: random.Random) -> None:
    """Something happens to a file of a run."""
    path = draw.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    data = path.read_bytes()
    match draw.choice(("lose", "cut", "flip", "empty", "folder", "link", "swap", "rename", "add", "unfinish")):
        case "lose":
            path.unlink()
        case "cut":
            path.write_bytes(data[: draw.randrange(len(data) + 1)])
        case "flip" if data:
            place = draw.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.unlink()
            path.mkdir()
        case "link":
            path.unlink()
            path.symlink_to(notes / "mine.txt")
        case "swap":
            (run / "checkpoint-1").rename(run / "aside")
            (run / "checkpoint-2").rename(run / "checkpoint-1")
            (run / "aside").rename(run / "checkpoint-2")
        case "rename":
            (run / "checkpoint-2").rename(run / "checkpoint-7")
        case "add":
            (path.parent / "mine.txt").write_text("mine")
        case "unfinish":
            shutil.rmtree(run / "policy")


@pytest.mark.parametrize("part", PARTS)
def test_run_folders(fuzz: Fuzz, tiny_model: Path, material: Path, finished: Path, part: int) -> None:
    draw = random.Random(f"folders {part}")
    weights = "policy/adapter_model.safetensors"
    for number in range(6):
        run = fuzz.folder / f"run-{number}"
        shutil.copytree(finished, run)
        text = (run / "config.yaml").read_text()  # the run lies elsewhere now, as after a move
        (run / "config.yaml").write_text(text.replace(str(finished), str(run)))
        for _ in range(draw.randint(1, 2)):
            if (run / "policy").exists() and (run / "checkpoint-2").exists():
                damage_folder(run, fuzz.notes, draw)
        added = {path: path.read_bytes() for path in run.rglob("mine.txt")}
        command = draw.choice(("--resume", "--resume", "--overwrite", "generate", "merge"))
        if command.startswith("--"):
            code = fuzz.run("dpo", *flags(dpo_settings(tiny_model, material, run)), command)
            if code == 0:  # whatever was damaged: these are the run's weights
                assert (run / weights).read_bytes() == (finished / weights).read_bytes()
        elif command == "generate":
            fuzz.run("generate", "--model", run / "policy", "--prompt", "the cat", "--max_new_tokens", 2)
        else:
            fuzz.run("merge", "--model", run / "policy", "--output_dir", fuzz.folder / f"merged-{number}")
        assert all(path.is_file() and path.read_bytes() == data for path, data in added.items())


# --- reward functions

BODIES = (
    "return [0.5] * len(completions)", "return [1] * len(completions)", "return 0.5", "return None", "return []",
    "return [None] * len(completions)", "return ['1'] * len(completions)", "return [float('nan')] * len(completions)",
    "return [10**400] * len(completions)", "return [1e38] * len(completions)", "return [[1]] * len(completions)",
    "return (float(len(c)) for c in completions)", "return {c: 1.0 for c in completions}", "return completions",
    "raise ValueError('\\x1b]0;title\\x07')", "raise SystemExit(0)", "raise KeyboardInterrupt", "raise GeneratorExit",
    "raise type('Own', (BaseException,), {'__str__': lambda self: 1 / 0})()", "os._exit(0)", "1 / 0", "sys.exit('bye')",
    "completions.clear(); prompts.clear(); return [0.0] * 4", "def again(): return again()\n    return again()",
    "return np.ones(len(completions))", "return torch.ones(len(completions), requires_grad=True)",
    "return type('Odd', (), {'__len__': lambda self: 1 / 0, '__iter__': lambda self: iter([])})()",
    "return [type('Odd', (), {'__float__': lambda self: 1 / 0})()] * len(completions)", "print('said')",
)  # fmt: skip
BEFORE = (
    "", "", "torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float64)", "os.chdir('/')",
    "sys.setrecursionlimit(60)", "torch.manual_seed(0)", "random.seed(0)", "np.random.seed(0)",
    "torch.set_num_threads(2)",
)  # fmt: skip
HEAD = "import os, random, signal, sys\nimport numpy as np, torch\n\n\ndef score(prompts, completions, **kwargs):\n"


@pytest.mark.parametrize("part", PARTS)
def test_reward_functions(fuzz: Fuzz, tiny_model: Path, material: Path, part: int) -> None:
    draw = random.Random(f"rewards {part}")
    for number in range(4):
        path = fuzz.notes / f"reward_{number}.py"
        body = draw.choice(BEFORE) or "pass"
        path.write_text(f"{HEAD}    {body}\n    {draw.choice(BODIES)}\n")
        settings = words_of("ppo", tiny_model, material, fuzz.folder) | {"reward_funcs": f"{path}:score"}
        fuzz.run("ppo", *flags(settings), its_own="run")  # a function may fail at its second call, in a run
        shutil.rmtree(fuzz.folder / "run", ignore_errors=True)
