"""What a run leaves: one JSON file that says where, when and from which code every number came."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

R = TypeVar("R")

SCHEMA = 2
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
LIMIT = "limit"  # the role of bare GEMMs and copies; candidates are "ours" or "peer"


@dataclass(frozen=True)
class Row:
    """One candidate in one case (shape and mode). Without times when it could not run: then `reason` says why."""

    shape: str
    sizes: dict[str, int]  # by axis
    mode: str
    candidate: str
    role: str  # ours | peer | limit
    reason: str | None = None
    seconds: tuple[float, ...] = ()  # every timed call, in the order of the rounds
    median: float | None = None  # seconds
    q1: float | None = None
    q3: float | None = None
    peak_bytes: int | None = None  # above the inputs
    errors: dict[str, float] = field(default_factory=dict)  # by result, against fp64
    launches: int | None = None  # on a GPU: kernels, copies and fills of one call
    gemms: int | None = None  # of the limit: how many this case cannot do without
    rate: float | None = None  # of the limits: FLOP/s of the GEMMs, bytes/s of the copy
    of_limit: float | None = None  # share of the measured limit that was reached: 1 is perfect


@dataclass(frozen=True)
class Result:
    """One benchmark of a run: what was finished of it."""

    benchmark: str
    about: str
    axes: str
    dtype: str
    modes: dict[str, str]  # name -> what is done
    rows: tuple[Row, ...]
    refused: str | None = None  # ours was wrong: then there are no rows


@dataclass(frozen=True)
class Report:
    device: str  # cpu | cuda
    machine: str
    folder: str  # the name of this machine's results
    quick: bool
    complete: bool  # False: the run was cut off, and cases are missing
    clock: str  # what a second is: of the wall, or of one processor
    repeats: int  # at most: slow cases have fewer rounds
    date: str
    commit: str
    dirty: bool
    load: float  # of the machine when the run began: how many processes wanted a core
    versions: dict[str, str]
    results: tuple[Result, ...]
    schema: int = SCHEMA


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str, bool]:
    """(hash, dirty). Results are no part of what was measured.

    Outside a repository (a copy on a borrowed machine) it is what ONECARD_COMMIT says, `<hash>` or `<hash>-dirty`, by
    the word of who made the copy; without that nobody knows, so it is dirty.
    """
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    if head is not None:
        return head, changes != ""
    told = os.environ.get("ONECARD_COMMIT", "")
    return told.removesuffix("-dirty") or "unknown", not told or told.endswith("-dirty")


def header(device: torch.device) -> dict[str, Any]:
    """What every report says: where and when it was made, from which code, with what."""
    line, folder = machine(device)
    head, dirty = commit()
    return {
        "device": device.type,
        "machine": line,
        "folder": folder,
        "date": now(),
        "commit": head,
        "dirty": dirty,
        "load": os.getloadavg()[0],
        "versions": versions(),
    }


def opening(about: Mapping[str, Any]) -> str:
    """The first line on the terminal, from a header."""
    dirty = " (dirty)" if about["dirty"] else ""
    return f"{about['machine']}; {torch.__version__}; commit {about['commit'][:12]}{dirty}"


def is_dirty(commit_before: str, *, dirty: bool) -> bool:
    """Whether a report belongs to no commit: changes when it began, or other code by now."""
    return dirty or commit() != (commit_before, False)


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device) -> tuple[str, str]:
    """(the machine in a line, the folder name of its results)."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        line = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}, CUDA {torch.version.cuda}"
        )
        return line, slug(card.name)
    threads = torch.get_num_threads()
    # Flags decide which BLAS kernels run, and many clouds give the model name without a number
    line = f"{processor()}, cores: {cores()}, threads: {threads}, {torch.backends.cpu.get_cpu_capability()}"
    return line, f"cpu-{cores()}-cores"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def stamped(name: str, date: str, commit: str, *more: str, dirty: bool, quick: bool = False) -> str:
    """A file name that sorts by date, and names the code; quick runs and dirty trees are told apart in a listing."""
    marks = "".join(mark for mark, on in (("-dirty", dirty), ("-quick", quick)) if on)
    return "-".join((name, re.sub(r"[-:]", "", date), commit[:7], *more)) + f"{marks}.json"


def file_name(report: Report) -> str:
    return stamped("kernels", report.date, report.commit, dirty=report.dirty, quick=report.quick)


def write_atomically(path: Path, data: bytes) -> None:
    """Whole or not at all: a reader, or a run that is cut off, never leaves half a file under the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save(report: Any, path: Path) -> None:
    """Any benchmark's report, as JSON."""
    write_atomically(path, (json.dumps(asdict(report), indent=1, allow_nan=False) + "\n").encode())


def result_of(values: dict[str, Any]) -> Result:
    rows = tuple(Row(**{**row, "seconds": tuple(row["seconds"])}) for row in values["rows"])
    return Result(**{**values, "rows": rows})


def read(path: Path, what: str, expected: dict[str, Any], build: Callable[[dict[str, Any]], R]) -> R:
    """A report whose `expected` entries are so. Raises ValueError with the file's name for anything else."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, value in expected.items():
            if values.get(name) != value:
                raise ValueError(f"{name} {values.get(name)!r}, expected {value!r}")
        return build(values)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no {what}: {error}") from None


def report_of(values: dict[str, Any]) -> Report:
    return Report(results=tuple(result_of(found) for found in values.pop("results")), **values)


def load(path: Path) -> Report:
    return read(path, "benchmark report", {"schema": SCHEMA}, report_of)
