"""The shape of the code in numbers: `python -m tests.structure [--before REVISION] [--time]` prints the table.

Entries at the top of the engine, circles of imports, imports that point to a higher layer, calls and files on the way
from a command to the line that clips and from `linear_logprobs` to the matrix product, lines of code, and the time of
`make test`.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from unittest import mock

import click

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "engine" / "onecard"
# Packages of the engine, from the lowest layer to the highest. A module imports from its own layer and those below.
LAYERS = (
    "utils", "config", "data", "models", "rollout", "rewards", "training", "reporting", "algorithms", "commands",
)  # fmt: skip
AREAS = ("engine", "kernels", "tests", "benchmarks")
Imports = Mapping[str, set[str]]


def modules(source: Path = ENGINE.parent) -> dict[str, Path]:
    """Dotted name -> file of each module below a source root."""
    files = {path: path.relative_to(source).with_suffix("").parts for path in sorted(source.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in files.items()}


def imports(known: Mapping[str, Path]) -> Imports:
    """Module -> the modules of the same source root that it imports, also inside functions."""
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (inner & known.keys()) or {node.module}
        found[name] = (named & known.keys()) - {name}
    return found


def circles(graph: Imports) -> list[list[str]]:
    """Groups of modules that import each other."""

    def reached(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def upward(graph: Imports) -> list[tuple[str, str]]:
    """Imports from a layer into a higher one."""

    def layer(name: str) -> int:
        parts = name.split(".")
        if len(parts) == 1:  # the package itself, which has the version
            return -1
        return LAYERS.index(parts[1]) if parts[1] in LAYERS else len(LAYERS)

    return sorted((name, other) for name, named in graph.items() for other in named if layer(other) > layer(name))


def top_level() -> list[str]:
    """Modules and packages at the top of the engine, except `__init__.py`, `__main__.py` and `py.typed`."""
    found = (path for path in ENGINE.iterdir() if not path.name.startswith("__") and path.name != "py.typed")
    return sorted(path.stem for path in found if path.suffix == ".py" or any(path.rglob("*.py")))


# --- the way from a call to a line


def way(run: Callable[[], object], reached: Callable[[FrameType], bool]) -> list[CodeType]:
    """The project's functions on the stack when `run` first calls a function that `reached` accepts."""
    stack: list[CodeType] = []
    roots = (str(ROOT / "engine"), str(ROOT / "kernels"))

    def trace(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or stack or not reached(frame):
            return
        here: FrameType | None = frame
        while here is not None:
            # a guard that torch's dispatcher calls on the way to an operator is part of the dispatch
            if here.f_code.co_filename.startswith(roots) and here.f_code.co_name != "guarded":
                stack.insert(0, here.f_code)
            here = here.f_back

    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)
    return stack


def calls_and_files(codes: Sequence[CodeType]) -> tuple[int, int]:
    """How many calls lead from the first function to the last, and how many files the functions are in."""
    return len(codes) - 1, len({code.co_filename for code in codes})


def way_to_the_clip(backend: str) -> list[CodeType]:
    """From `onecard ppo`, run on a tiny model, to the function with the line that clips."""
    from onecard.commands import cli
    from onecard_kernels import dispatch
    from tests.tiny import write_tiny_model

    def reached(frame: FrameType) -> bool:
        name = "policy_terms" if backend == "torch" else "policy_kernel"
        return frame.f_code.co_name == name

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n' * 8)
        words = ["ppo", "--model", str(folder / "model"), "--dataset", str(folder / "prompts.jsonl")]
        words += ["--reward_funcs", "length:4", "--response_length", "4", "--max_steps", "1", "--test_size", "0"]
        words += ["--batch_size", "8", "--output_dir", str(folder / "run")]

        def run() -> None:
            with suppress(SystemExit), mock.patch.dict(dispatch.PREFERENCE, cpu=(backend,)):
                cli.main(words)

        return way(run, reached)


def way_to_the_product(backend: str) -> list[CodeType]:
    """From `linear_logprobs` to the function with the matrix product of hidden states and head."""
    import torch

    from onecard_kernels import linear_logprobs

    hidden, weight, targets = torch.randn(4, 8), torch.randn(16, 8), torch.arange(4)
    return way(
        lambda: linear_logprobs(hidden, weight, targets, backend=backend), lambda frame: frame.f_code.co_name == PRODUCT
    )


PRODUCT = "project"  # of onecard_kernels.logprob.matmul


def lines_of(area: str, revision: str = "") -> int:
    """Lines of Python below a folder, now or at a revision."""
    pattern = f"{area}/*.py"
    if not revision:
        names = subprocess.run(
            ["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        return sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names.split())
    words = ["git", "grep", "-c", "", revision, "--", pattern]
    counted = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum(int(line.rpartition(":")[2]) for line in counted.splitlines())


def measured(revision: str) -> list[tuple[str, str, str]]:
    """Rows of the table: what, before, now."""
    graph = imports(modules())
    rows = [
        ("entries at the top of engine/onecard", "", str(len(top_level()))),
        ("circles of imports", "", str(len(circles(graph)))),
        ("imports into a higher layer", "", str(len(upward(graph)))),
    ]
    for backend in ("torch", "triton"):
        for what, path in {
            "`onecard ppo` to the line that clips": way_to_the_clip(backend),
            "`linear_logprobs` to the product": way_to_the_product(backend),
        }.items():
            rows.append((f"{what}, {backend}: calls, files", "", "{}, {}".format(*calls_and_files(path))))
    for area in AREAS:
        rows.append((f"lines of {area}", f"{lines_of(area, revision):,}" if revision else "", f"{lines_of(area):,}"))
    return rows


@click.command()
@click.option("--before", "revision", default="", help="A revision whose lines of code are shown beside today's.")
@click.option("--time", "timed", is_flag=True, help="Run `make test` too, and print its seconds.")
@click.option("--ways", is_flag=True, help="Print the functions on each way instead of the table.")
def main(revision: str, timed: bool, ways: bool) -> None:
    """Print the table."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if ways:
        for backend in ("torch", "triton"):
            for codes in (way_to_the_clip(backend), way_to_the_product(backend)):
                click.echo(f"\n{backend}")
                for code in codes:
                    click.echo(f"  {code.co_name}  {Path(code.co_filename).relative_to(ROOT)}:{code.co_firstlineno}")
        return
    rows = measured(revision)
    click.echo("| what | before | now |\n|---|---|---|")
    for row in rows:
        click.echo(f"| {' | '.join(row)} |")
    if timed:
        began = time.perf_counter()
        subprocess.run(["make", "test"], cwd=ROOT, stdout=sys.stderr, check=True)
        click.echo(f"| `make test`, seconds | | {time.perf_counter() - began:.0f} |")


if __name__ == "__main__":
    main()
