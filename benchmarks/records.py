"""The one record format: a report is a JSON file of cases, and a case has a row for each candidate.

Every report names the machine, the commit, the versions and the clock. Every row has the seconds of each round, so
that medians, quartiles and ratios are computed from the file. `Recorder` writes the file again after every case: a run
that is cut off leaves what it had.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT, Spread, spread

SCHEMA = 4
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "peft", "accelerate",
            "bitsandbytes", "datasets")  # fmt: skip
OURS = "onecard"
WHOLE = "the whole iteration"  # the row of a training step's sum
LIMIT = "limit"  # the role of bare GEMMs and copies; candidates are "ours" or "peer"


@dataclass(frozen=True)
class Row:
    """A candidate of a case, or a phase of a training step. `reason`: why it has no times."""

    name: str
    role: str  # ours | peer | limit
    reason: str | None = None
    seconds: tuple[float, ...] = ()  # of each round
    tokens: tuple[int, ...] = ()  # of each round
    flops: tuple[int, ...] = ()  # of each round: what it cannot do without
    peak_bytes: int | None = None  # above what was allocated before
    held_bytes: int | None = None  # weights, adapters and optimizer
    errors: dict[str, float] = field(default_factory=dict)  # by result, against fp64
    launches: int | None = None  # on a GPU: kernels, copies and fills of one call
    gemms: int | None = None  # of the limit: bare products in a call
    rate: float | None = None  # of the limit: FLOP/s of the GEMMs, bytes/s of the copy
    of_limit: float | None = None  # time of the unavoidable work at the measured rate, over the time taken
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def time(self) -> Spread | None:
        return spread(self.seconds) if self.seconds else None

    @property
    def token_rate(self) -> Spread | None:
        return per_second(self.tokens, self.seconds)


@dataclass(frozen=True)
class Case:
    """`what` at one size in one mode. `about`: what was set; `found`: what was measured beside the rows."""

    what: str  # the operation or the algorithm
    name: str  # of the size or setting
    sizes: dict[str, int]
    dtype: str
    mode: str = ""
    rows: tuple[Row, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None  # ours was wrong, or did not run: nothing was timed

    @property
    def key(self) -> tuple[str, str, str]:
        return self.what, self.name, self.mode

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def limit(self) -> Row | None:
        """The bare products."""
        return next((row for row in self.rows if row.role == LIMIT and (row.gemms or row.flops)), None)


@dataclass(frozen=True)
class Report:
    benchmark: str
    device: str  # cpu | cuda
    machine: str
    folder: str  # the name of this machine's results
    quick: bool  # too small to conclude from
    complete: bool  # False: the run was cut off, and cases are missing
    clock: str  # "wall time", or the processor time of one thread
    repeats: int  # at most: slow cases have fewer rounds
    date: str
    commit: str
    dirty: bool
    load: float  # of the machine when the run began
    versions: dict[str, str]
    cases: tuple[Case, ...] = ()
    schema: int = SCHEMA

    @property
    def kinds(self) -> dict[str, list[Case]]:
        """Cases by what they measure."""
        found: dict[str, list[Case]] = {}
        for case in self.cases:
            found.setdefault(case.what, []).append(case)
        return found


def per_second(amounts: tuple[int, ...], seconds: tuple[float, ...]) -> Spread | None:
    if not seconds or not amounts:
        return None
    return spread([amount / taken for amount, taken in zip(amounts, seconds, strict=True)])


def ratio(row: Row, other: Row) -> Spread | None:
    """Time over the other's time, round by round: a slow round slows both."""
    pairs = list(zip(row.seconds, other.seconds, strict=False))  # one that is timed alone may have fewer rounds
    return spread([mine / theirs for mine, theirs in pairs]) if pairs else None


def share_of_limit(row: Row, case: Case) -> float | None:
    if row.of_limit is not None or not sum(row.flops):
        return row.of_limit
    limit = case.limit()
    mine, most = per_second(row.flops, row.seconds), limit and per_second(limit.flops, limit.seconds)
    return mine.median / most.median if mine and most else None


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str, bool]:
    """(hash, dirty); results are no part of what is measured.

    Outside a repository (a copy on another machine) it is what ONECARD_COMMIT says, `<hash>` or `<hash>-dirty`; without
    that it is unknown and dirty.
    """
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    if head is not None:
        return head, changes != ""
    told = os.environ.get("ONECARD_COMMIT", "")
    return told.removesuffix("-dirty") or "unknown", not told or told.endswith("-dirty")


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
        memory = f"{card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}, CUDA {torch.version.cuda}"
        return f"{card.name}, {memory}", slug(card.name)
    # Flags decide which BLAS kernels run, and many clouds give the model name without a number.
    threads, flags = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, cores: {cores()}, threads: {threads}, {flags}", f"cpu-{cores()}-cores"


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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file and rename it, so that nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def load(path: Path) -> Report:
    """A report; ValueError with the file's name for anything else."""
    lists = ("seconds", "tokens", "flops")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema {values.get('schema')!r}, expected {SCHEMA}")
        cases = []
        for case in values.pop("cases"):
            rows = (Row(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in case.pop("rows"))
            cases.append(Case(**case, rows=tuple(rows)))
        return Report(**values, cases=tuple(cases))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no benchmark report: {error}") from None


class Recorder:
    """A report in the making, whose file is written after every case."""

    def __init__(
        self,
        benchmark: str,
        device: torch.device,
        *,
        clock: str = "wall time",
        repeats: int = 1,
        quick: bool = False,
        out: Path | None = None,
        name: str = "",
    ) -> None:
        line, folder = machine(device)
        head, dirty = commit()
        self.report = Report(
            benchmark, device.type, line, folder, quick, False, clock, repeats, now(), head, dirty, os.getloadavg()[0],
            versions(),
        )  # fmt: skip
        # The name sorts by date and has the commit; quick runs and dirty trees can be told apart in a listing.
        marks = "".join(mark for mark, on in (("-dirty", dirty), ("-quick", quick)) if on)
        parts = (benchmark, re.sub(r"[-:]", "", self.report.date), head[:7], slug(name))
        self.path = (out or RESULTS / folder) / f"{'-'.join(filter(None, parts))}{marks}.json"

    def opening(self) -> str:
        """The first line on the terminal."""
        report = self.report
        dirty = " (dirty)" if report.dirty else ""
        return f"{report.machine}; {torch.__version__}; commit {report.commit[:12]}{dirty}"

    def put(self, cases: Iterable[Case], *, complete: bool = False) -> None:
        """Replace the cases, and write the file. The tree must not have changed since the run began either."""
        dirty = self.report.dirty or commit() != (self.report.commit, False)
        self.report = replace(self.report, cases=tuple(cases), complete=complete, dirty=dirty)
        data = json.dumps(asdict(self.report), indent=1, allow_nan=False) + "\n"
        write_atomically(self.path, data.encode())
