"""Tuning and the sanitizer: all settings and kernels run, a proposal is beyond the spread, a blind checker is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ahead, cli, records, render, tune
from benchmarks.launches import LAUNCHES
from benchmarks.records import OURS, Case, Row
from benchmarks.tune import CUDA, DRY, KNOBS, Knob
from onecard_kernels import launch
from onecard_kernels.launch import recording
from onecard_kernels.logprob import tuning

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import sanitize
from benchmarks.sanitize import CPU, GROUPS, PLANTED, READY, judged

# --- tuning


@pytest.mark.long
@pytest.mark.skipif(launch.why_not(torch.device("cpu")) is not None, reason="triton does not run here")
def test_every_knob_runs_dry_and_leaves_no_trace(tmp_path: Path) -> None:
    before = dict(tuning.TABLE)
    assert cli.main(tune.command, ["--dry", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    report = records.load(path)
    assert [case.what for case in report.cases] == list(KNOBS)
    for case in report.cases:
        labels = [row.name for row in case.rows if row.role == "ours"]
        assert labels == [OURS, *map(tune.label, tune.settings_of(KNOBS[case.what], "cpu", dry=True))]
        assert all(row.seconds for row in case.rows)
    assert dict(tuning.TABLE) == before
    assert "| knob | mode |" in path.with_suffix(".md").read_text()


def test_a_knob_runs_dry(tmp_path: Path) -> None:
    assert cli.main(tune.command, ["--dry", "--knob", "chunk-rows", "--data-only", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    [case] = records.load(path).cases
    assert [row.name for row in case.rows][:3] == [OURS, "rows=256", "rows=4096"]


@pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)
def test_every_number_that_a_knob_varies_is_in_the_library(knob: Knob) -> None:
    for settings in knob.settings.values():
        for values in settings:
            with knob.apply(values):  # raises for what is not there
                pass
    axes = {tuple(shape.sizes) for shapes in knob.shapes.values() for shape in shapes}
    assert axes == {tuple(knob.benchmark.shapes["cpu"].usual[0].sizes)}
    assert DRY in knob.shapes
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


def test_a_proposal_is_faster_beyond_the_spread_slower_nowhere_and_small() -> None:
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


def test_every_kernel_that_is_launched_is_in_a_group() -> None:
    launched: set[str] = set()
    for configuration in (c for launches in LAUNCHES for c in launches() if c.typical):
        with recording() as launches:
            configuration.launch((9, 0))
        launched |= set(map(ahead.name_of, launches))
    found = {name for cases in GROUPS.values() for each in cases.values() for name in sanitize.kernels_of(each, CPU)}
    assert found == launched != set()


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, cases in GROUPS.items() for name in cases])
def test_every_case_agrees_with_the_torch_backend(group: str, name: str) -> None:
    right = GROUPS[group][name](CPU, "torch")
    assert all(x.isfinite().any() and x.abs().max() > 0 for x in right.values() if x.dim())
    assert sanitize.difference(GROUPS[group][name](CPU, "triton"), right) is None
    wrong = {key: x + 0.02 * (1 + x[x.isfinite()].abs().max()) for key, x in right.items()}
    assert "is off by" in str(sanitize.difference(wrong, right))


CLEAN, HAZARD = "========= ERROR SUMMARY: 0 errors", "========= RACECHECK SUMMARY: 1 hazard displayed (1 error)"
SPOKEN = {
    "clean": ("memcheck", "tiled", f"a: {READY}\n{CLEAN}", 0, "clean", True),
    "bad reads": ("memcheck", "tiled", f"a: {READY}\n========= ERROR SUMMARY: 3 errors\n{CLEAN}", 0, "3 errors", False),
    "a hazard": ("racecheck", "tiled", f"a: {READY}\n{HAZARD}", 0, "1 error", False),
    "wrong numbers": ("memcheck", "tiled", f"x is off\n{CLEAN}", 1, "wrong results", False),
    "no tool there": ("memcheck", "tiled", f"a: {READY}\nDevice not supported", 0, "no summary", False),
    "too slow": ("memcheck", "tiled", f"a: {READY}\n{CLEAN}", None, "cut off", False),
    "a fault is found": ("racecheck", PLANTED, HAZARD, 1, "1 error", True),
    "a fault is not found": ("memcheck", PLANTED, CLEAN, 0, "clean", False),
}


@pytest.mark.parametrize("what", SPOKEN)
def test_what_a_checker_says_is_read(what: str) -> None:
    tool, group, text, status, state, ok = SPOKEN[what]
    found = judged(tool, group, (text, status, 1.0))
    assert (found.found["state"], found.found["ok"]) == (state, ok)
    assert bool(sanitize.verdict([found])) != ok


def test_dry_runs_the_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry", "--group", "vocabulary KL", "--out", str(tmp_path)]
    assert cli.main(sanitize.command, words) == 0, capsys.readouterr().out
    [path] = tmp_path.glob("sanitizer-*-quick.json")
    [found] = records.load(path).cases
    assert (found.what, found.found["state"]) == (sanitize.DRY, "clean")
    assert "Clean, " in render.markdown(records.load(path), path.name)
    if not torch.cuda.is_available():
        assert cli.main(sanitize.command, []) == 2
        assert "error: a GPU is needed" in capsys.readouterr().err


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from benchmarks.sanitize import FAULTS
for tool, kernel in FAULTS.items():
    source = ASTSource(kernel, {"x_ptr": "*i32", "y_ptr": "*i32", "BLOCK": "constexpr"}, constexprs={(2,): 128})
    done = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(tool, len(done.asm["cubin"]) > 0, "bar.sync" in done.asm["ptx"], "st.volatile.shared" in done.asm["ptx"])
"""


def test_the_planted_faults_compile_and_the_race_has_no_barrier() -> None:
    env = {name: value for name, value in sanitize.environment(dry=False).items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["memcheck True False False", "racecheck True False True"], done.stderr
    assert CUDA in KNOBS["hopper-tile"].settings
