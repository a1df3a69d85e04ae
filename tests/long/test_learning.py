"""The learning table with one seed: every bar of docs/examples/learning.py, on runs made here. `make test-long`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import records
from docs.examples.learning import SHARED, TASKS, Found, bar_cell, found_of, jobs_of, run_all, verdicts

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    if not (records.ROOT / SHARED).is_dir():
        pytest.skip(f"needs models and data in {SHARED} beside the repository")
    output: Path = tmp_path_factory.mktemp("learning")
    jobs = jobs_of(output, seeds=1)
    failures = run_all([job for own in jobs.values() for job in own], at_a_time=2)
    assert not failures, failures
    return {each.task.name: each for each in found_of(jobs)}


@pytest.mark.parametrize("name", list(TASKS))
def test_it_learns(found: dict[str, Found], name: str) -> None:
    for bar, values in verdicts(found[name]):
        assert bar.met(values), bar_cell(bar, values)
