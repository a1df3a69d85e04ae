"""Kills of `python -m tests.e2e.kills`: each resumed command ends with the same files as an uninterrupted one."""

from __future__ import annotations

import os
import subprocess
import sys


def test_twenty_killed_commands_resume_to_the_same_result() -> None:
    """In a process of its own, since its children are forked."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.kills", "--kills", "20", "--no_reports"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    count, before, at_random, _, equal = (cell.strip() for cell in done.stdout.splitlines()[-1].split("|")[2:7])
    assert (count, equal) == ("20", "20")
    assert int(before) == int(at_random) == 10
