"""Every Triton kernel, compiled for every card without a GPU; and the tool that does it, on kernels of known faults."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import cards
from benchmarks.cards import CARDS, Row
from benchmarks.launches import LAUNCHES
from onecard_kernels.launch import recording

triton = pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "kernels" / "onecard_kernels"
TILED = "logprob.triton_tiled"  # its tiles need the tensor cores of 8.0


def run(*arguments: str, table: str = "") -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The command in a process that compiles; `table` is Python that may replace its list of launches."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("engine", "kernels", ""))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"from benchmarks import cards\n{table}\ncards.command()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )
    file = Path(arguments[arguments.index("--json") + 1])
    return done, json.loads(file.read_text()) if file.exists() else []


def broken(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{r['kernel']} on {r['card']}, {r['configurations'][0]}: {r['broken']}" for r in rows if r["broken"]]


# --- the package's kernels


def test_every_kernel_keeps_the_bars_on_every_card(tmp_path: Path) -> None:
    required = [name for name, card in CARDS.items() if card.required]
    names = [word for name in required for word in ("--card", name)]
    done, rows = run("--typical", *names, "--json", str(tmp_path / "rows.json"))
    assert rows, done.stderr
    assert broken(rows) == []
    assert done.returncode == 0
    # A launch by launch table: none is left out but the tiles on a T4.
    kernels = {row["kernel"] for row in rows}
    missing = {(k, c) for k in kernels for c in required} - {(row["kernel"], row["card"]) for row in rows}
    assert {(k.partition(":")[0], c) for k, c in missing} <= {(TILED, "sm_75")}
    assert kernels == configured()
    assert not [row for row in rows if row["dot"] and row["card"] == "sm_75"]


@pytest.mark.grid
def test_every_size_and_option_keeps_the_bars_on_a_4090(tmp_path: Path) -> None:
    done, rows = run("--card", "sm_89", "--json", str(tmp_path / "rows.json"))
    assert rows, done.stderr
    assert broken(rows) == []
    assert done.returncode == 0


# --- the list of launches has all of them


@dataclass(frozen=True)
class Module:
    """A file of the package, read and not run. Names are `ppo.triton:policy_kernel`."""

    name: str
    tree: ast.Module

    @property
    def kernels(self) -> dict[str, ast.FunctionDef]:
        """Functions decorated with @triton.jit or @triton.jit(...)."""
        functions = [node for node in self.tree.body if isinstance(node, ast.FunctionDef)]
        return {f.name: f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}

    @cached_property
    def imports(self) -> dict[str, str]:
        """Full names of what comes from other files of the package, by the name that it has here."""
        parents = self.name.split(".")
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = ".".join([*parents[: len(parents) - node.level], *filter(None, [node.module])])
                found |= {alias.asname or alias.name: f"{module}:{alias.name}" for alias in node.names}
        return found

    def full_name(self, name: str) -> str:
        return self.imports.get(name, f"{self.name}:{name}")

    def launched(self) -> Iterator[str]:
        """Full names of kernels: what is called as `..._kernel[grid](...)`."""
        for call in calls(self.tree):
            if isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value).endswith("_kernel"):
                yield self.full_name(ast.unparse(call.func.value))

    def helpers(self) -> Iterator[str]:
        """What kernels call, or hand to what they call."""
        for kernel in self.kernels.values():
            for name in {node.id for node in ast.walk(kernel) if isinstance(node, ast.Name)}:
                yield self.full_name(name)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def modules() -> list[Module]:
    files = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "launch.py"]
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in files]
    return [Module(name, ast.parse(path.read_text())) for name, path in zip(names, files, strict=True)]


def configured() -> set[str]:
    names: set[str] = set()
    for configuration in (c for launches in LAUNCHES for c in launches()):
        with recording() as launches:
            configuration.launch((9, 0))
        names |= set(map(cards.name_of, launches))
    return names


def test_every_kernel_that_is_launched_is_in_the_list() -> None:
    launched = {name for module in modules() for name in module.launched()}
    assert launched
    assert configured() == launched


def test_every_kernel_is_launched_or_called_by_one() -> None:
    everything = {f"{module.name}:{name}" for module in modules() for name in module.kernels}
    used = {name for module in modules() for name in (*module.launched(), *module.helpers())}
    assert everything - used == set()


# --- the tool, on kernels with known faults

KERNELS = '''
import os
import torch
import triton
import triton.language as tl

@triton.jit
def copy(x, y, n, factor, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n) * factor
    if shift is not None:
        v += shift
    tl.store(y + at, v, mask=at < n)

@triton.jit
def sum_twice(x, y, BLOCK: tl.constexpr):
    """Holds all of x in registers between two reads of it."""
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(y + at, v / tl.sum(v * v))

@triton.jit
def multiply(x, y, M: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr):
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, K)[None, :]
    total = tl.zeros((M, M), tl.float32)
    for i in range(STEPS):
        v = tl.load(x + i * M * K + rows * K + columns)
        w = tl.load(y + i * M * K + rows * K + columns)
        total += tl.dot(v, w.T)
    tl.store(x + rows * M + tl.arange(0, M)[None, :], total.to(tl.float16))

@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))

@triton.jit
def fatal(x):
    tl.store(x, 0.0)
'''

TABLE = """
import os, sys
sys.path.insert(0, {folder!r})
import known, torch
from benchmarks.launches import Configuration, meta

def on(kernel, *args, grid=(1,), **options):
    return lambda _: kernel[grid](*args, **{{"num_stages": 2, **options}})

half = lambda *shape: meta(*shape, dtype=torch.float16)
big = meta(1 << 16)
real = cards.measured
cards.measured = lambda program: os._exit(7) if "fatal" in cards.name_of(program.launch) else real(program)
cards.LAUNCHES = (lambda: iter([{launches}]),)
"""


def known(tmp_path: Path, launches: str, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    (tmp_path / "known.py").write_text(KERNELS)
    table = TABLE.format(folder=str(tmp_path), launches=launches)
    done, rows = run(*arguments, "--json", str(tmp_path / "rows.json"), table=table)
    assert rows, done.stderr
    return done.returncode, rows, done.stdout


@pytest.mark.grid
def test_faults_are_found(tmp_path: Path) -> None:
    code, rows, out = known(
        tmp_path,
        """
        Configuration("spills", on(known.sum_twice, big, big, BLOCK=1 << 15, num_warps=2), least=(8, 0)),
        Configuration("shared", on(known.multiply, half(1 << 16), half(1 << 16), M=128, K=128, STEPS=64,
                                   num_warps=8, num_stages=3), least=(8, 0)),
        Configuration("wide", on(known.copy, big, big, 5, 1.0, None, BLOCK=128, grid=(1, 65536))),
        Configuration("wrong", on(known.wrong, big, BLOCK=128)),
        Configuration("fatal", on(known.fatal, big), least=(8, 9)),
        Configuration("fine", on(known.copy, big, big, 1 << 16, 1.0, None, BLOCK=128)),
        """,
        *("--card", "sm_75", "--card", "sm_80", "--card", "sm_89"),
    )
    found = {(row["configurations"][0], row["card"]): row for row in rows}
    for card in ("sm_80", "sm_89"):
        spills = found["spills", card]
        assert spills["spilled"] > 0
        assert spills["stack"] > 0
        assert "of spills" in spills["broken"][0]
    for card in ("sm_75", "sm_80", "sm_89"):
        assert found["wide", card]["broken"] == ["65536 programs along axis 1 of the grid, the limit is 65535"]
        assert "does not compile: CompilationError" in found["wrong", card]["broken"][0]
        fine = found["fine", card]
        assert (fine["broken"], fine["spilled"], fine["stack"], fine["dot"]) == ([], 0, 0, False)
        assert 8 <= fine["registers"] <= 64
    assert found["fatal", "sm_89"]["broken"] == ["does not compile: the compiler crashed"]
    assert ("fatal", "sm_80") not in found
    # Two pieces of 128 x 128 halves, in as many copies as the stages ask for.
    assert ("shared", "sm_75") not in found
    assert found["shared", "sm_80"]["shared"] == found["shared", "sm_89"]["shared"] == 2 * 2 * 128 * 128 * 2
    assert found["shared", "sm_80"]["dot"]
    assert found["shared", "sm_80"]["broken"] == []
    assert found["shared", "sm_89"]["broken"] == ["131072 bytes of shared memory, the limit is 101376"]
    assert code == 1
    assert "break a bar" in out


@pytest.mark.grid
def test_arguments_are_specialised_as_triton_does(tmp_path: Path) -> None:
    """Equal programs share a line: multiples of 16 are one, 1 is a constant, and so is None; wide ints are 64 bits."""
    sizes = {"16": "16", "32": "32", "17": "17", "33": "33", "1": "1", "long": "1 << 31"}
    ints = [f"Configuration('{k}', on(known.copy, big, big, {v}, 1.0, None, BLOCK=128))" for k, v in sizes.items()]
    others = [
        "Configuration('odd address', on(known.copy, big[1:], big, 16, 1.0, None, BLOCK=128))",
        "Configuration('even address', on(known.copy, big[4:], big, 16, 1.0, None, BLOCK=128))",
        "Configuration('half', on(known.copy, half(64), big, 16, 1.0, None, BLOCK=128))",
        "Configuration('shift', on(known.copy, big, big, 16, 1.0, 2.5, BLOCK=128))",
        "Configuration('other float', on(known.copy, big, big, 16, 7.0, 3.5, BLOCK=128))",
        "Configuration('warps', on(known.copy, big, big, 16, 1.0, None, BLOCK=128, num_warps=8), typical=True)",
    ]
    code, rows, _ = known(tmp_path, ",".join([*ints, *others]), "--card", "sm_90", "--card", "gfx942")
    nvidia = [row["configurations"] for row in rows if row["card"] == "sm_90"]
    assert nvidia == [
        *(["16", "32", "even address"], ["17", "33"], ["1"], ["long"]),
        *(["odd address"], ["half"], ["shift", "other float"], ["warps"]),
    ]
    assert [row["typical"] for row in rows if row["card"] == "sm_90"] == [False] * 7 + [True]
    assert code == 0
    assert all(row["registers"] > 0 for row in rows)


def test_it_says_why_it_does_not_run_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "interpreted", lambda: True)
    done = CliRunner().invoke(cards.command, ["--typical"])
    assert done.exit_code == 2
    assert "unset it" in done.output


ROW = Row("k", ("c", "d"), True, "sm_89", True, 4, 2, 1024, False, 20, 0, 0, 512)


def test_what_is_not_required_is_shown_and_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = replace(ROW, card="gfx942", required=False, broken=("too slow",))
    assert cards.show([ROW, shown])
    out = capsys.readouterr().out
    assert "shown only: k on gfx942, c: too slow" in out
    assert "c (and 1 more)" in out
    assert "0.5 / 1" in out
    assert not cards.show([ROW, replace(shown, required=True)])


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"stack": 8}, ["8 bytes of stack, 0 of spills"]),
        ({"spilled": 4}, ["0 bytes of stack, 4 of spills"]),
        ({"shared": 1024}, []),
        ({"shared": 1025}, ["1025 bytes of shared memory, the limit is 1024"]),
    ],
)
def test_bars(change: dict[str, Any], broken: list[str]) -> None:
    assert list(cards.broken_bars(replace(ROW, **change), (2**31 - 1, 65535, 65535), 512)) == broken


def test_tensor_memory_has_a_bar() -> None:
    assert list(cards.broken_bars(ROW, (1,), 513)) == ["513 columns of tensor memory, the limit is 512"]
