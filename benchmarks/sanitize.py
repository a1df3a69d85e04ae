"""`python -m benchmarks.sanitize`: the GPU tests of the Triton kernels under NVIDIA's compute-sanitizer.

memcheck finds accesses outside of a tensor; PyTorch's memory cache is off, so that every tensor has bounds of its own.
racecheck finds accesses to shared memory without a barrier. Each tool runs each group of tests in a process of its own,
at small sizes. The tests compare the kernels with fp64: "clean" means that the kernels ran and were right.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch

from benchmarks import cli, records
from benchmarks.cli import Refused
from benchmarks.records import Case, Recorder

# memcheck: unowned memory after every allocation; errors of the driver's API are not reported
TOOLS: dict[str, tuple[str, ...]] = {"memcheck": ("--padding", "256", "--report-api-errors", "no"), "racecheck": ()}
DRY = "interpreter"  # in the place of a tool
# Tests of tests/gpu by file and expression; together they launch every kernel.
GROUPS = {
    "hidden states": ("test_losses_on_a_card.py", "triton and linear and values"),
    "logits": ("test_losses_on_a_card.py", "triton and logits or triton and selective"),
    "tokens": ("test_tokens_on_a_card.py", "triton and against"),
    "tiled": ("test_regressions_on_a_card.py", "triton and each_implementation or tensor_cores"),
}
SUMMARY = re.compile(r"(?:RACECHECK SUMMARY: (\d+) hazards?|ERROR SUMMARY: (\d+) errors?)")
USUAL_PLACE = "/usr/local/cuda/bin"  # of the toolkit, which PATH need not name
AT_ONCE = 4  # processes that share the GPU; most of their time is starting Python and compiling
TAIL = 40  # lines of a log that are kept


def judged(tool: str, group: str, text: str, status: int | None, seconds: float) -> Case:
    """A process's output and exit status (None: cut off) as a case. Clean: the tests passed, and no errors."""
    summaries = SUMMARY.findall(text)
    errors = sum(int(hazards or other) for hazards, other in summaries)
    if status is None:
        state = "cut off"
    elif errors:
        state = f"{errors} error{'s' * (errors > 1)}"
    elif status:
        state = "wrong results"
    elif tool != DRY and not summaries:
        state = "no summary"
    else:
        state = "clean"
    tail = [] if state == "clean" else text.splitlines()[-TAIL:]
    return Case(tool, group, {}, "", found={"state": state, "seconds": round(seconds, 1), "tail": tail})


def check(tool: str, group: str, deadline: float) -> Case:
    """Run a group of tests under a tool until the deadline."""
    file, expression = GROUPS[group]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", expression, f"tests/gpu/{file}"]
    more = {"TRITON_INTERPRET": "1"}
    if tool != DRY:
        command = [str(checker()), "--tool", tool, *TOOLS[tool], "--target-processes", "all", *command]
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "ONECARD_SMALL_SIZES": "1"}
    began = time.monotonic()
    done = subprocess.run(
        ["timeout", "--signal=KILL", f"{max(1.0, deadline - began):.0f}", *command],  # with the processes it started
        cwd=records.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    status = None if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL) else done.returncode
    return judged(tool, group, done.stdout, status, time.monotonic() - began)


def checker() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=USUAL_PLACE)


@click.command(context_settings=cli.SETTINGS)
@click.option("--group", "groups", type=click.Choice(list(GROUPS)), multiple=True, help="Only this group.")
@click.option("--minutes", type=float, default=2.5, show_default=True, help="After these, what is left is cut off.")
@click.option("--dry", is_flag=True, help="No tool and no GPU: the same tests, in Triton's interpreter.")
@cli.OUT
def command(groups: Sequence[str], minutes: float, dry: bool, out: Path | None) -> None:
    """Run every Triton kernel at a small size under compute-sanitizer's memcheck and racecheck.

    Exit status: 0 if every group is clean with both tools; 1 if not; 2 where there is no GPU or no compute-sanitizer.
    """
    if not dry and not torch.cuda.is_available():
        raise click.UsageError("a GPU is needed, torch sees none (--dry runs the same kernels in the interpreter).")
    if not dry and checker() is None:
        raise click.UsageError(f"compute-sanitizer is neither on PATH nor in {USUAL_PLACE}; it is in the CUDA toolkit.")
    deadline = time.monotonic() + 60 * minutes
    jobs = [(tool, group) for tool in ((DRY,) if dry else TOOLS) for group in groups or GROUPS]
    with ThreadPoolExecutor(max_workers=min(AT_ONCE, records.cores())) as pool:
        cases = list(pool.map(lambda job: check(*job, deadline), jobs))
    recorder = Recorder("sanitizer", torch.device("cpu" if dry else "cuda"), quick=dry, out=out)
    recorder.put(cases, complete=not groups and all(case.found["state"] != "cut off" for case in cases))
    for case in cases:
        lines = [f"{case.what:12} {case.name:20} {case.found['state']}, {case.found['seconds']:.0f} s"]
        click.echo("\n    ".join([*lines, *case.found["tail"]]))
    click.echo(f"wrote {recorder.path}")
    wrong = [f"{case.what} of {case.name}: {case.found['state']}" for case in cases if case.found["state"] != "clean"]
    if wrong:
        raise Refused("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(cli.main(command))
