"""The shape of the code in numbers: `python -m tests.structure [--before REVISION]` prints the table.

Modules at the top of the engine, circles of imports, imports that point to a higher layer, calls and files on the way
from a command to the line that clips and from `linear_logprobs` to the matrix product, and lines of code.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FrameType

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
    """Groups of modules that import each other (strongly connected components of two or more)."""

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
        return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else len(LAYERS)

    return sorted((name, other) for name, named in graph.items() for other in named if layer(other) > layer(name))


def top_level() -> list[str]:
    """Modules and packages at the top of the engine, but for `__init__.py`, `__main__.py` and `py.typed`."""
    found = (path for path in ENGINE.iterdir() if not path.name.startswith("__") and path.name != "py.typed")
    return sorted(path.stem for path in found)


# --- the way from a call to a line


class Reached(Exception):
    """The line was reached."""


def way(run: Callable[[], object], reached: Callable[[FrameType], bool]) -> list[CodeType]:
    """The project's functions on the stack when `run` first calls a function that `reached` accepts."""
    stack: list[CodeType] = []
    roots = (str(ROOT / "engine"), str(ROOT / "kernels"))

    def trace(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and not stack and reached(frame):
            here: FrameType | None = frame
            while here is not None:
                if here.f_code.co_filename.startswith(roots) and here.f_code.co_name[0] != "<":
                    stack.insert(0, here.f_code)
                here = here.f_back
            sys.setprofile(None)

    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)
    return stack
