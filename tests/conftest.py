"""Shared fixtures. Models and data outside the repository are used where they are, and skipped with a reason if not."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread waits more than it works

import torch

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter; to be said before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.tiny import write_tiny_model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_path(relative: str) -> Path:
    """A file or folder of the shared data, or a skip that names it."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative} in ../shared/data beside the repository")
    return path


@pytest.fixture(scope="module", autouse=True)
def gc_skips_what_is_imported() -> None:
    """Hundreds of thousands of objects of libraries: many tests collect garbage, and each time would look at all."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without their report, whose plots take longer than all the rest of a small run."""
    from onecard import reporting

    monkeypatch.setattr(reporting, "write_run_report", lambda folder, *_: folder / "report.html")


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """A pretrained Llama of 656 K parameters."""
    return shared_path("models/TinyStories-656K")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A pretrained Llama of 260 K parameters whose BOS is its EOS."""
    return shared_path("models/stories260K")


@pytest.fixture(scope="session")
def politeness() -> Path:
    """1094 preference pairs."""
    return shared_path("prefs/rasbt_politeness.jsonl")


@pytest.fixture(scope="session")
def stories() -> Path:
    """187 short stories."""
    return shared_path("text/tinystories.jsonl")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random two-layer Llama and a small byte-level BPE tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty preference rows."""
    words = ["cat", "dog", "hen", "cow", "fox"]
    rows = [
        {
            "prompt": f"Tell me about the {words[i % 5]} number {i}.",
            "chosen": f" The {words[i % 5]} is a good answer.",
            "rejected": f" bad {words[(i + 1) % 5]} mat",
        }
        for i in range(40)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Result:
    """What a command did: its exit code and both outputs."""

    code: int
    out: str
    err: str


@pytest.fixture
def onecard(capsys: pytest.CaptureFixture[str]):
    """`onecard("dpo", "--model", folder, ...)` in this process, as the `onecard` command would run it."""
    from onecard.commands import cli

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run
