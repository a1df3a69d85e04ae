"""Tuning and the sanitizer: all settings and kernels run, and a proposal is beyond the spread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import cli, records, render, sanitize, tune
from benchmarks.records import OURS, Case, Row
from benchmarks.sanitize import judged
from benchmarks.tune import KNOBS, Knob
from onecard_kernels import launch
from onecard_kernels.logprob import tuning

pytest.importorskip("triton", reason="triton is not installed")

# --- tuning


@pytest.mark.grid
@pytest.mark.skipif(launch.unavailable_reason(torch.device("cpu")) is not None, reason="triton does not run here")
def test_every_knob_runs_dry_and_leaves_no_trace(tmp_path: Path) -> None:
    before = dict(tuning.TABLE)
    assert cli.main(tune.command, ["--dry", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    report = records.load(path)
    assert [case.what for case in report.cases] == list(KNOBS)
    for case in report.cases:
        labels = [row.name for row in case.rows if row.role == "ours"]
        assert labels == [OURS, *map(tune.label, tune.cases_of(KNOBS[case.what], "cpu", dry=True)[1])]
        assert all(row.seconds for row in case.rows)
    assert dict(tuning.TABLE) == before
    assert "| knob | mode |" in path.with_suffix(".md").read_text()


def test_a_knob_runs_dry(tmp_path: Path) -> None:
    assert cli.main(tune.command, ["--dry", "--knob", "chunk-rows", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    [case] = records.load(path).cases
    assert [row.name for row in case.rows][1:4] == [OURS, "rows=256", "rows=4096"]


@pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)
def test_every_number_that_a_knob_varies_is_in_the_library(knob: Knob) -> None:
    for settings in knob.settings.values():
        for values in settings:
            with knob.apply(values):  # raises for what is not there
                pass
    axes = {tuple(shape.sizes) for shapes in knob.shapes.values() for shape in shapes}
    assert axes == {tuple(knob.benchmark.shapes["cpu"].usual[0].sizes)}
    assert knob.mode in knob.benchmark.modes


def case(*rows: tuple[str, tuple[float, ...], int], vocabulary: int = 70) -> Case:
    made = tuple(
        Row(name, "ours", seconds=seconds, peak_bytes=peak, errors={"dHidden": 0.0}) for name, seconds, peak in rows
    )
    return Case("chunk-rows", f"v{vocabulary}", {"N": 10, "D": 4, "V": vocabulary}, "bfloat16", "frozen", made)


DEFAULT = (OURS, (10.0, 10.1, 10.2, 10.3, 10.4), 0)
CLEAR = ("rows=2048", (9.0, 9.1, 9.2, 9.3, 9.4), 0)
OVERLAPS = ("rows=512", (8.0, 8.0, 9.0, 10.3, 10.4), 0)  # the best median, and quartiles in those of the default
SLOWER = ("rows=2048", (12.0, 12.1, 12.2, 12.3, 12.4), 0)


def test_a_proposal_is_faster_beyond_the_spread() -> None:
    knob = KNOBS["chunk-rows"]
    found = tune.proposal(knob, [case(DEFAULT, OVERLAPS, CLEAR)])
    assert found == (pytest.approx(9.2 / 10.2, abs=1e-3), "rows=2048")
    assert tune.proposal(knob, [case(DEFAULT, OVERLAPS)]) is None
    assert tune.proposal(knob, [case(DEFAULT, CLEAR), case(DEFAULT, SLOWER)]) is None
    assert tune.proposal(knob, [case(DEFAULT, CLEAR), case(DEFAULT)]) is None  # it did not run everywhere
    returned = 10 * 4 * 2
    assert tune.proposal(knob, [case(DEFAULT, (*CLEAR[:2], 10**9 + returned))]) is not None
    assert tune.proposal(knob, [case(DEFAULT, (*CLEAR[:2], 10**9 + returned + 1))]) is None


# --- the sanitizer

CLEAN, HAZARD = "========= ERROR SUMMARY: 0 errors", "========= RACECHECK SUMMARY: 1 hazard displayed (1 error)"


@pytest.mark.parametrize(
    ("tool", "text", "status", "state"),
    [
        ("memcheck", CLEAN, 0, "clean"),
        ("memcheck", f"========= ERROR SUMMARY: 3 errors\n{CLEAN}", 0, "3 errors"),
        ("racecheck", HAZARD, 0, "1 error"),
        ("memcheck", CLEAN, 1, "wrong results"),
        ("memcheck", "Device not supported", 0, "no summary"),
        ("memcheck", CLEAN, None, "cut off"),
    ],
)
def test_clean_is_what_passed_with_a_summary_of_no_errors(tool: str, text: str, status: int | None, state: str) -> None:
    assert judged(tool, "tiled", text, status, 1.0).found["state"] == state


@pytest.mark.grid
def test_dry_runs_the_tests_in_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(sanitize.command, ["--dry", "--group", "tiled", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("sanitizer-*-quick.json")
    [found] = records.load(path).cases
    assert (found.what, found.name, found.found["state"]) == (sanitize.DRY, "tiled", "clean")
    assert "Clean, " in render.markdown(records.load(path), path.name)
    if not torch.cuda.is_available():
        assert cli.main(sanitize.command, []) == 2
        assert "error: a GPU is needed" in capsys.readouterr().err
