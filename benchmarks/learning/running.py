"""The table's runs: `onecard` as a user would call it, a few at a time, and what each left."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.learning.data import make_data
from benchmarks.learning.tasks import TASKS, Rows, Task

RECORD = "learning.json"
POLL = 0.2  # seconds between looks at the runs in flight


@dataclass(frozen=True)
class Job:
    """One task with one seed; `output` is the folder that holds all runs."""

    task: Task
    seed: int
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / f"{self.task.name}-{self.seed}"

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.task.arguments, "--seed", str(self.seed), "--output_dir", str(self.folder))

    @property
    def command(self) -> str:
        return shlex.join(("onecard", *self.arguments))


def jobs_of(output: Path, seeds: int) -> dict[str, list[Job]]:
    """The table's runs: seeds 1 to `seeds` of each task, or as many as it takes."""
    return {
        name: [Job(task, seed, output) for seed in range(1, min(seeds, task.most_seeds or seeds) + 1)]
        for name, task in TASKS.items()
    }


@dataclass(frozen=True)
class Finished:
    """A finished run's `learning.json`: what it was, and from which code its numbers came."""

    command: str
    commit: str
    dirty: bool
    versions: dict[str, str]
    processor: str
    date: str
    wall_seconds: float
    cpu_seconds: float


def finished(job: Job) -> Finished | None:
    """The record of a run that came to its end under this very command; None where there is none."""
    try:
        record = Finished(**json.loads((job.folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.command == job.command and (job.folder / "metrics.jsonl").is_file() else None


def rows_of(job: Job) -> Rows:
    """A finished run's metrics; none of any other."""
    if finished(job) is None:
        return ()
    lines = (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def environment() -> dict[str, str]:
    """One thread for each run, and this tree's own sources, installed or not."""
    sources = os.pathsep.join(str(records.ROOT / name) for name in ("engine", "kernels"))
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([sources, given]) if given else sources
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


@dataclass
class Flight:
    """A run that is under way."""

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    began: float


def start(job: Job) -> Flight:
    (job.folder / RECORD).unlink(missing_ok=True)
    job.output.mkdir(parents=True, exist_ok=True)
    log = job.output / f"{job.folder.name}.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "onecard", *job.arguments, "--overwrite"],
            cwd=records.ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C comes to this process alone, which ends them
        )
    return Flight(job, process, log, time.monotonic())


def ended(flight: Flight, origin: Mapping[str, Any]) -> str | None:
    """None while it runs; then "" with its record written, or why it has none."""
    pid, status, usage = os.wait4(flight.process.pid, os.WNOHANG)
    if pid == 0:
        return None
    code = flight.process.returncode = os.waitstatus_to_exitcode(status)
    if code:
        lines = flight.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{flight.job.folder.name}: exit status {code}: {lines[-1] if lines else 'no output'} ({flight.log})"
    record = Finished(
        command=flight.job.command,
        wall_seconds=round(time.monotonic() - flight.began, 1),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        date=records.now(),
        **origin,
    )
    text = json.dumps(asdict(record), indent=1) + "\n"
    records.write_atomically(flight.job.folder / RECORD, text.encode())
    return ""


def run_all(
    jobs: Sequence[Job], at_a_time: int, shown: Callable[[Sequence[str], int], None] = lambda names, done: None
) -> list[str]:
    """Run what is not finished yet; returns why each failed run failed. `shown(names in flight, runs done)`."""
    head, dirty = records.commit()
    origin = {"commit": head, "dirty": dirty, "versions": records.versions(), "processor": records.processor()}
    waiting = [job for job in jobs if finished(job) is None]
    done, failures = len(jobs) - len(waiting), []
    if waiting:
        make_data()
    flights: list[Flight] = []
    try:
        while waiting or flights:
            while waiting and len(flights) < at_a_time:
                flights.append(start(waiting.pop(0)))
            shown([flight.job.folder.name for flight in flights], done)
            time.sleep(POLL)
            for flight in list(flights):
                outcome = ended(flight, origin)
                if outcome is not None:
                    flights.remove(flight)
                    done += 1
                    failures += [outcome] if outcome else []
    finally:
        for flight in flights:
            os.kill(flight.process.pid, signal.SIGTERM)
            flight.process.wait()
    shown([], done)
    return failures
