"""Kills of `python -m tests.e2e.kills`: each resumed command ends with the same files as an uninterrupted one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("count", [8, pytest.param(20, marks=pytest.mark.grid)])
def test_killed_commands_resume_to_the_same_result(count: int) -> None:
    """8 kills: one of each command. They run in a process of their own, which forks the commands."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.kills", "--kills", str(count), "--no_reports"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    kills, before, at_random, _, equal = (cell.strip() for cell in done.stdout.splitlines()[-1].split("|")[2:7])
    assert int(kills) == int(equal) == count
    assert int(before) == int(at_random) == count // 2
