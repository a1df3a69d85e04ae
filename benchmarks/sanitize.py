"""`python -m benchmarks.sanitize`: every Triton kernel under NVIDIA's compute-sanitizer, for bad addresses and races.

One process for each tool and group of kernels of `sanitized.py`. memcheck sees reads and writes outside of what was
allocated: PyTorch's cache of memory is off in those processes, so every tensor has bounds of its own. racecheck sees
accesses to shared memory without a barrier between them. First of all both run on a kernel with a planted fault: what a
tool that finds none of it says of other kernels is worth nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.kernels import Refused
from benchmarks.kernels import main as guarded
from benchmarks.options import out_option
from benchmarks.sanitized import GROUPS, READY
from onecard_kernels.launch import why_not

# memcheck: memory that belongs to nobody after every allocation, and what is asked of the driver is not our matter
TOOLS: dict[str, tuple[str, ...]] = {"memcheck": ("--padding", "256", "--report-api-errors", "no"), "racecheck": ()}
DRY = "interpreter"  # in the place of a tool
PLANTED = "planted fault"
SUMMARY = re.compile(r"(?:RACECHECK SUMMARY: (\d+) hazards?|ERROR SUMMARY: (\d+) errors?)")
USUAL_PLACE = "/usr/local/cuda/bin"  # of the toolkit, which PATH need not name
AT_ONCE = 4  # processes that share the GPU; most of their time is starting Python and compiling
MOST_SECONDS = 90.0  # of one process
TAIL = 40  # lines of a log that are kept


@dataclass(frozen=True)
class Row:
    """What one process ended with. `state`: clean, N errors, cut off, wrong results, or no summary."""

    tool: str
    group: str
    state: str
    errors: int | None
    seconds: float
    tail: tuple[str, ...] = ()  # of the log, where it is not clean

    @property
    def ok(self) -> bool:
        return bool(self.errors) if self.group == PLANTED else self.state == "clean"


@dataclass(frozen=True)
class Report:
    benchmark: str
    device: str
    machine: str
    dry: bool
    complete: bool
    date: str
    commit: str
    dirty: bool
    versions: dict[str, str]
    checker: str  # its own line about its version
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Ended:
    """A process: everything it printed, its exit status (None: it was stopped at its limit), and the time it took."""

    text: str
    status: int | None
    seconds: float


def find_checker() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=USUAL_PLACE)


def command_of(checker: str | None, tool: str, group: str) -> list[str]:
    arguments = ["--plant", tool] if group == PLANTED else [group]
    child = [sys.executable, "-m", "benchmarks.sanitized", *arguments]
    if checker is None:
        return child
    return [checker, "--tool", tool, *TOOLS[tool], "--target-processes", "all", *child]


def environment(*, dry: bool) -> dict[str, str]:
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    path = os.pathsep.join([*(str(records.ROOT / part) for part in ("kernels", "engine", "")), *given])
    more = {"TRITON_INTERPRET": "1"} if dry else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def run_process(command: Sequence[str], env: Mapping[str, str], limit: float) -> Ended:
    """In a session of its own, which is ended with it at the limit."""
    begun = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=records.ROOT,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            text, status = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, status = process.communicate()[0], None
    return Ended(text, status, time.monotonic() - begun)


def judged(tool: str, group: str, ended: Ended) -> Row:
    """What the process's output says; nothing but a summary without errors and right results are clean."""
    found = SUMMARY.findall(ended.text)
    errors = sum(int(hazards or other) for hazards, other in found) if found else None
    if ended.status is None:
        state = "cut off"
    elif tool != DRY and errors is None:
        state = "no summary"
    elif errors:
        state = f"{errors} error{'s' * (errors > 1)}"
    elif group != PLANTED and (READY not in ended.text or ended.status != 0):
        state = "wrong results"
    else:
        state = "clean"
    row = Row(tool, group, state, errors, round(ended.seconds, 1))
    return row if row.ok else Row(**{**vars(row), "tail": tuple(ended.text.splitlines()[-TAIL:])})


Job = tuple[str, str]  # tool, group
Runner = Callable[[Sequence[str], Mapping[str, str], float], Ended]


def check(
    jobs: Sequence[Job], checker: str | None, deadline: float, at_once: int, runner: Runner = run_process
) -> list[Row]:
    """All jobs, some at a time. What is not begun before the deadline, or not over then, is cut off."""
    env = environment(dry=checker is None)

    def one(job: Job) -> Row:
        left = deadline - time.monotonic()
        ended = runner(command_of(checker, *job), env, min(left, MOST_SECONDS)) if left > 0 else Ended("", None, 0.0)
        return judged(*job, ended)

    with ThreadPoolExecutor(max_workers=at_once) as pool:
        return list(pool.map(one, jobs))


def shown(row: Row) -> str:
    return f"found, {row.state}" if row.group == PLANTED and row.ok else row.state


def table_of(rows: Sequence[Row]) -> Table:
    """Groups by tools."""
    tools = list(dict.fromkeys(row.tool for row in rows))
    table = Table("kernels", *tools)
    for group in dict.fromkeys(row.group for row in rows):
        cells = {row.tool: row for row in rows if row.group == group}
        words = [f"{shown(cells[tool])}, {cells[tool].seconds:.0f} s" if tool in cells else "" for tool in tools]
        table.add_row(group, *words, style=None if all(cell.ok for cell in cells.values()) else "bold red")
    return table


def version_of(checker: str | None) -> str:
    if checker is None:
        return "none: Triton's interpreter"
    lines = run_process([checker, "--version"], os.environ, 30.0).text.split("\n")
    return next((line.strip() for line in lines if "ersion" in line), checker)


def verdict(rows: Sequence[Row], complete: bool) -> str | None:
    """What is to be said in a line if not all is well."""
    blind = [row.tool for row in rows if row.group == PLANTED and not row.ok]
    if blind:
        return f"{', '.join(blind)}: the tool does not see a planted fault here, so it says nothing about our kernels"
    bad = [f"{row.tool} of {row.group}: {row.state}" for row in rows if not row.ok]
    if bad or not complete:
        return "; ".join(bad) or "not all groups ran"
    return None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--group", "groups", type=click.Choice(list(GROUPS)), multiple=True, help="Only this group, or these.")
@click.option("--minutes", type=float, default=2.5, show_default=True, help="After these, what is left is cut off.")
@click.option("--dry", is_flag=True, help="No tool and no GPU: the same processes, in Triton's interpreter.")
@out_option("the JSON file")
def command(groups: Sequence[str], minutes: float, dry: bool, out: Path | None) -> None:
    """Run every Triton kernel at a small size under compute-sanitizer's memcheck and racecheck.

    Exit status: 0 if every group is clean with both tools and their planted faults were found; 1 if not; 2 where there
    is no GPU or no compute-sanitizer.
    """
    deadline = time.monotonic() + 60 * minutes
    checker = None if dry else find_checker()
    if not dry:
        refuse_without(checker)
    device = torch.device("cpu" if dry else "cuda")
    tools = (DRY,) if dry else tuple(TOOLS)
    at_once = min(AT_ONCE, records.cores())
    rows = [] if dry else check([(tool, PLANTED) for tool in tools], checker, deadline, at_once)
    seeing = [tool for tool in tools if dry or any(row.ok for row in rows if row.tool == tool)]
    rows += check([(tool, group) for tool in seeing for group in groups or GROUPS], checker, deadline, at_once)
    (commit, dirty), (line, folder) = records.commit(), records.machine(device)
    complete = not groups and all(row.state != "cut off" for row in rows) and len(seeing) == len(tools)
    about = (device.type, line, dry, complete, records.now(), commit, dirty, records.versions(), version_of(checker))
    report = Report("sanitize", *about, rows=tuple(rows))
    path = out or records.ROOT / "benchmarks" / "results" / folder
    path /= records.stamped("sanitizer", report.date, commit, dirty=dirty, quick=dry)
    records.save(report, path)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table_of(rows))
    for row in rows:
        for text in row.tail:
            console.print(f"{row.tool}, {row.group} | {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    problem = verdict(rows, complete or bool(groups))
    if problem is not None:
        raise Refused(problem)


def refuse_without(checker: str | None) -> None:
    missing = why_not(torch.device("cuda"))
    if not torch.cuda.is_available():
        raise click.UsageError("a GPU is needed, torch sees none (--dry runs the same kernels in the interpreter).")
    if missing is not None:
        raise click.UsageError(f"{missing}: there are no kernels to check.")
    if checker is None:
        raise click.UsageError(f"compute-sanitizer is neither on PATH nor in {USUAL_PLACE}; it is in the CUDA toolkit.")


main = partial(guarded, entry=command)

if __name__ == "__main__":
    sys.exit(main())
