"""The kernels under a checker: all of them run, what it says is read rightly, and a blind one is found out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ahead, records, sanitize, sanitized
from benchmarks.launches import LAUNCHES
from benchmarks.sanitize import DRY, PLANTED, TOOLS, Ended, judged
from benchmarks.sanitized import CPU, GROUPS, READY, kernels_of
from onecard_kernels.launch import recording

pytest.importorskip("triton", reason="triton is not installed")

EVERY_CASE = [(group, name) for group, cases in GROUPS.items() for name in cases]
NO_ERRORS = {"memcheck": "========= ERROR SUMMARY: 0 errors",
             "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"}  # fmt: skip
FAULTS = {"memcheck": "========= ERROR SUMMARY: 3 errors",
          "racecheck": "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"}  # fmt: skip


def test_every_kernel_that_is_launched_is_in_a_group() -> None:
    launched: set[str] = set()
    for configuration in (c for launches in LAUNCHES for c in launches() if c.typical):
        with recording() as launches:
            configuration.launch((9, 0))
        launched |= set(map(ahead.name_of, launches))
    assert launched
    assert {name for cases in GROUPS.values() for case in cases.values() for name in kernels_of(case, CPU)} == launched


@pytest.mark.parametrize(("group", "name"), EVERY_CASE)
def test_every_case_agrees_with_the_torch_backend(group: str, name: str) -> None:
    case = GROUPS[group][name]
    right = case(CPU, "torch")
    assert all(x.isfinite().any() and x.abs().max() > 0 for x in right.values() if x.dim())
    assert sanitized.difference(case(CPU, "triton"), right) is None


@pytest.mark.parametrize("wrong", [float("nan"), 0.01, float("inf")])
def test_a_difference_is_seen(wrong: float) -> None:
    right = {"value": torch.tensor([1.0, float("-inf"), 2.0])}
    assert sanitized.difference({"value": right["value"].clone()}, right) is None
    off = {"value": torch.tensor([1.0 + wrong, float("-inf"), 2.0])}
    assert "value is off by" in str(sanitized.difference(off, right))


def test_wrong_results_end_a_group(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def case(device: torch.device, backend: str) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(2) * (1 if backend == "torch" else 1.1)}

    monkeypatch.setitem(GROUPS, "tiled", {"one": case})
    assert sanitized.main(["tiled"]) == 1
    out = capsys.readouterr().out
    assert "tiled, one: x is off by 0.1" in out
    assert READY not in out


DONE = f"a:b: {READY}"
SPOKEN = {
    "clean": ("memcheck", "tiled", f"{DONE}\n{NO_ERRORS['memcheck']}", 0, "clean", True),
    "no hazards": ("racecheck", "tiled", f"{DONE}\n{NO_ERRORS['racecheck']}", 0, "clean", True),
    "bad reads": ("memcheck", "tiled", f"{DONE}\n{FAULTS['memcheck']}", 0, "3 errors", False),
    "a hazard": ("racecheck", "tiled", f"{DONE}\n{FAULTS['racecheck']}", 0, "1 error", False),
    "summaries": ("memcheck", "tiled", f"{DONE}\n{FAULTS['memcheck']}\n{NO_ERRORS['memcheck']}", 0, "3 errors", False),
    "wrong numbers": ("memcheck", "tiled", f"x is off\n{NO_ERRORS['memcheck']}", 1, "wrong results", False),
    "ended badly": ("memcheck", "tiled", f"{DONE}\n{NO_ERRORS['memcheck']}", 1, "wrong results", False),
    "no tool there": ("memcheck", "tiled", f"{DONE}\nDevice not supported", 0, "no summary", False),
    "too slow": ("memcheck", "tiled", f"{DONE}\n{NO_ERRORS['memcheck']}", None, "cut off", False),
    "dry": (DRY, "tiled", DONE, 0, "clean", True),
    "dry, wrong": (DRY, "tiled", "x is off", 1, "wrong results", False),
    "a fault is found": ("racecheck", PLANTED, FAULTS["racecheck"], 1, "1 error", True),
    "a fault is not found": ("racecheck", PLANTED, NO_ERRORS["racecheck"], 0, "clean", False),
    "no checker speaks": ("memcheck", PLANTED, "Traceback", 1, "no summary", False),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOKEN)
def test_what_a_checker_says_is_read(what: str) -> None:
    tool, group, text, status, state, ok = SPOKEN[what]
    row = judged(tool, group, Ended(text, status, 1.0))
    assert (row.state, row.ok) == (state, ok)
    assert bool(row.tail) != ok


CHECKER = """#!{python}
import sys, time
words = sys.argv[1:]
if words == ["--version"]:
    print("A checker\\nVersion 1.2")
    sys.exit()
tool, child = words[1], words[words.index("benchmarks.sanitized") + 1:]
said = {said!r}
if child[0] == "--plant":
    print(said["planted"][tool])
    sys.exit(1)
{then}
print("a:b: {ready}")
print(said["clean"][tool])
"""
Made = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Made:
    """The command, with a checker that says what it is told to: exit status, report, what was printed."""

    def run(*arguments: str, planted: dict[str, str] = FAULTS, clean: dict[str, str] = NO_ERRORS, then: str = ""):
        script = tmp_path / "compute-sanitizer"
        said = {"planted": planted, "clean": clean}
        script.write_text(CHECKER.format(python=sys.executable, said=said, then=then, ready=READY))
        script.chmod(0o755)
        monkeypatch.setattr(sanitize, "refuse_without", lambda checker: None)
        monkeypatch.setattr(sanitize, "find_checker", lambda: str(script))
        monkeypatch.setattr(records, "machine", lambda device: (f"a {device.type}", "a-card"))
        status = sanitize.main(["--out", str(tmp_path / "out"), *arguments])
        (file,) = (tmp_path / "out").glob("sanitizer-*.json")
        captured = capsys.readouterr()
        return status, json.loads(file.read_text()), captured.out + captured.err

    return run


def test_all_groups_run_with_both_tools_after_the_planted_faults(checked: Made) -> None:
    status, report, out = checked()
    assert status == 0, out
    assert (report["device"], report["checker"], report["complete"]) == ("cuda", "Version 1.2", True)
    found = [(row["tool"], row["group"]) for row in report["rows"]]
    assert found == [(tool, PLANTED) for tool in TOOLS] + [(tool, group) for tool in TOOLS for group in GROUPS]
    assert all(row["state"] == "clean" for row in report["rows"] if row["group"] != PLANTED)


def test_a_tool_that_sees_no_planted_fault_says_nothing(checked: Made) -> None:
    """Its groups do not run; those of the other do."""
    status, report, out = checked(planted={**FAULTS, "memcheck": NO_ERRORS["memcheck"]})
    assert status == 1
    assert "memcheck: the tool does not see a planted fault here" in out
    assert {row["tool"] for row in report["rows"] if row["group"] != PLANTED} == {"racecheck"}
    assert not report["complete"]


def test_a_hazard_fails_and_its_log_is_kept(checked: Made) -> None:
    then = 'print("========= Potential WAW hazard")'
    status, report, out = checked("--group", "tiled", clean={**NO_ERRORS, "racecheck": FAULTS["racecheck"]}, then=then)
    assert status == 1
    assert "refused: racecheck of tiled: 1 error" in out
    assert "racecheck, tiled | ========= Potential WAW hazard" in out
    (bad,) = (row for row in report["rows"] if row["group"] == "tiled" and row["tool"] == "racecheck")
    assert "========= Potential WAW hazard" in bad["tail"]


def test_what_takes_too_long_is_cut_off(checked: Made) -> None:
    begun = time.monotonic()
    status, report, _ = checked("--group", "tiled", "--minutes", "0.08", then="time.sleep(60)")
    assert time.monotonic() - begun < 40
    assert status == 1
    assert {row["state"] for row in report["rows"] if row["group"] == "tiled"} == {"cut off"}
    assert not report["complete"]


def test_the_command_of_a_tool() -> None:
    line = sanitize.command_of("/cs", "memcheck", "tiled")
    assert line[:2] == ["/cs", "--tool"]
    assert line[-3:] == ["-m", "benchmarks.sanitized", "tiled"]
    assert sanitize.command_of(None, DRY, "tiled") == line[-4:]
    assert sanitize.command_of("/cs", "racecheck", PLANTED)[-2:] == ["--plant", "racecheck"]
    assert sanitize.environment(dry=False)["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_without_a_gpu_or_the_tool_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == 2
    assert "error: a GPU is needed" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "find_checker", lambda: None)
    assert sanitize.main([]) == 2
    assert "error: compute-sanitizer is neither on PATH" in capsys.readouterr().err


def test_dry_runs_the_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--dry", "--group", "vocabulary KL", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    (file,) = tmp_path.glob("sanitizer-*-quick.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["tool"], row["state"]) == (DRY, "clean")


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from benchmarks.planted import FAULTS
for tool, kernel in FAULTS.items():
    source = ASTSource(kernel, {"x_ptr": "*i32", "y_ptr": "*i32", "BLOCK": "constexpr"}, constexprs={(2,): 128})
    done = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(tool, len(done.asm["cubin"]), "bar.sync" in done.asm["ptx"], "st.volatile.shared" in done.asm["ptx"])
"""


def test_the_planted_faults_are_code_for_a_card() -> None:
    """Compiled, to the end; and the race stays in it, without a barrier."""
    env = {name: value for name, value in sanitize.environment(dry=False).items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(tool, int(size) > 0, *rest) for tool, size, *rest in lines] == [
        ("memcheck", True, "False", "False"),
        ("racecheck", True, "False", "True"),
    ]
