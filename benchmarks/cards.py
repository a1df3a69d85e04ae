"""`python -m benchmarks.cards`: compiles every Triton kernel for every card, without a GPU.

It prints the registers, stack and shared memory of each kernel, and names kernels that would spill or would not start.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import cli
from benchmarks.launches import LAUNCHES, Capability, Configuration
from benchmarks.render import table
from onecard_kernels.launch import Launch, interpreted, recording, unavailable_reason

PACKAGE = "onecard_kernels."
KIB = 1024
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # programs along each axis, on every card below
TENSOR_MEMORY = 512  # columns; Blackwell's data-centre cards alone have it


@dataclass(frozen=True)
class Card:
    """A target of the compiler. `shared`: bytes that one block may ask for, the opt-in limit (CUDA C++ Programming
    Guide, table of technical specifications per compute capability; on AMD a workgroup's LDS)."""

    name: str
    examples: str
    capability: Capability
    shared: int
    backend: str = "cuda"
    warp: int = 32
    required: bool = True  # a broken bar is an error, and not only shown

    @property
    def architecture(self) -> int | str:
        return self.capability[0] * 10 + self.capability[1] if self.backend == "cuda" else self.name


CARDS = {
    card.name: card
    for card in (
        Card("sm_75", "T4, RTX 20", (7, 5), 64 * KIB),
        Card("sm_80", "A100, A30", (8, 0), 163 * KIB),
        Card("sm_86", "RTX 30, A10", (8, 6), 99 * KIB),
        Card("sm_89", "RTX 40, L4", (8, 9), 99 * KIB),
        Card("sm_90", "H100, H200", (9, 0), 227 * KIB),
        Card("sm_100", "B200", (10, 0), 227 * KIB),
        Card("sm_120", "RTX 50", (12, 0), 99 * KIB),
        Card("gfx942", "MI300", (9, 4), 64 * KIB, backend="hip", warp=64, required=False),
    )
}


@dataclass(frozen=True)
class Row:
    """A kernel as Triton specialises it for these configurations on this card.

    Sizes are in bytes, stack and spills those of a thread. None: it did not compile.
    """

    kernel: str
    configurations: tuple[str, ...]
    typical: bool
    card: str
    required: bool
    warps: int
    stages: int
    shared_limit: int
    dot: bool | None = None
    registers: int | None = None
    spilled: int | None = None
    stack: int | None = None
    shared: int | None = None
    broken: tuple[str, ...] = ()


@dataclass
class Program:
    """A kernel to compile, and the configurations that Triton specialises to it."""

    card: Card
    launch: Launch
    typical: bool
    configurations: list[str] = field(default_factory=list)

    def row(self, **found: Any) -> Row:
        launch, card = self.launch, self.card
        asked = (name_of(launch), tuple(self.configurations), self.typical)
        return Row(*asked, card.name, card.required, launch.num_warps, launch.num_stages, card.shared, **found)


def name_of(launch: Launch) -> str:
    """`ppo.triton:policy_kernel`"""
    kernel = launch.kernel.fn
    return f"{kernel.__module__.removeprefix(PACKAGE)}:{kernel.__name__}"


class CompileOnlyDriver:
    """A driver for Triton of a card that is not here: enough to compile for it."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.card.backend, self.card.architecture, self.card.warp)

    def get_current_device(self) -> str:
        return self.card.name  # under which Triton keeps what it compiled

    def get_current_stream(self, device: str) -> int:
        return 0


def warm_up(launch: Launch, card: Card) -> Any:
    """Compile a kernel as Triton does before its first launch, with its own rules of specialisation."""
    from triton.runtime.driver import driver

    driver.set_active(CompileOnlyDriver(card))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **options, **launch.constexprs)


def specialisation(launch: Launch, card: Card) -> str:
    """Types, divisibilities, constants and options: equal texts are equal programs."""
    from triton import knobs

    keys: list[str] = []

    def note(key: str, **_: Any) -> bool:
        keys.append(key)
        return True  # "compiled already"

    knobs.runtime.jit_cache_hook = note
    try:
        warm_up(launch, card)
    finally:
        knobs.runtime.jit_cache_hook = None
    return keys[0]


def programs(configurations: Iterable[Configuration], cards: Sequence[Card], kernel: str = "") -> list[Program]:
    """What all configurations launch on all cards, each program once."""
    found: dict[tuple[str, str, str], Program] = {}
    for configuration in configurations:
        for card in cards:
            if card.capability < configuration.least:
                continue
            with recording() as launches:
                configuration.launch(card.capability)
            for launch in launches:
                if kernel not in name_of(launch):
                    continue
                key = (card.name, name_of(launch), specialisation(launch, card))
                program = found.setdefault(key, Program(card, launch, False))
                program.typical |= configuration.typical
                if configuration.name not in program.configurations:
                    program.configurations.append(configuration.name)
    return list(found.values())


def measured(program: Program) -> Row:
    """Compiles one program. What the compiler prints (on failure, all of the assembly) is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            compiled = warm_up(program.launch, program.card)
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            return program.row(broken=(f"does not compile: {type(error).__name__}: {first[:200]}",))
        used = USAGE[program.card.backend](program, compiled)
    row = program.row(dot="tt.dot" in compiled.asm["ttir"], shared=compiled.metadata.shared, **used)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return replace(row, broken=tuple(broken_bars(row, program.launch.grid, tensor_memory)))


def broken_bars(row: Row, grid: Sequence[int], tensor_memory: int) -> Iterator[str]:
    """Every spill lies on the stack, and no kernel here has another use for one: so none may have a stack."""
    if row.stack or row.spilled:
        yield f"{row.stack} bytes of stack, {row.spilled} of spills"
    if (row.shared or 0) > row.shared_limit:
        yield f"{row.shared} bytes of shared memory, the limit is {row.shared_limit}"
    if tensor_memory > TENSOR_MEMORY:
        yield f"{tensor_memory} columns of tensor memory, the limit is {TENSOR_MEMORY}"
    for axis, (size, limit) in enumerate(zip(grid, GRID_LIMITS, strict=False)):
        if size > limit:
            yield f"{size} programs along axis {axis} of the grid, the limit is {limit}"


def nvidia_usage(program: Program, compiled: Any) -> dict[str, int]:
    """Registers and stack of the machine code; spills from the assembler's log, only where there is a stack."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (number(rf"\b{name}:(\d+)", done.stdout) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "spilled": spilled_bytes(program) if stack else 0}


def spilled_bytes(program: Program) -> int:
    from triton import knobs

    log = io.StringIO()
    program.launch.kernel.device_caches.clear()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        warm_up(program.launch, program.card)
    return number(r"(\d+) bytes spill stores", log.getvalue())


def amd_usage(program: Program, compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    registers, spilled, stack = (
        number(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return {"registers": registers, "stack": stack, "spilled": 4 * spilled}


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the tool's answer: {text[:300]!r}")
    return int(found.group(1))


USAGE = {"cuda": nvidia_usage, "hip": amd_usage}

TODO: list[Program] = []  # of a worker, which gets it by forking: kernels cannot be pickled


def measured_at(index: int) -> Row:
    return measured(TODO[index])


def measure_all(programs: Sequence[Program], workers: int) -> Iterator[tuple[int, Row]]:
    """(index, row) as they come. A program that kills the compiler is found by giving each a process of its own."""
    TODO[:] = programs
    fork = multiprocessing.get_context("fork")
    left = set(range(len(programs)))
    with ProcessPoolExecutor(workers, fork) as pool:
        futures = {pool.submit(measured_at, index): index for index in left}
        for future in as_completed(futures):
            with contextlib.suppress(BrokenProcessPool):
                row = future.result()
                left.remove(futures[future])
                yield futures[future], row
    for index in sorted(left):
        with ProcessPoolExecutor(1, fork) as pool:
            try:
                yield index, pool.submit(measured_at, index).result()
            except BrokenProcessPool:
                yield index, programs[index].row(broken=("does not compile: the compiler crashed",))


# --- the command

HEADINGS = ("configuration", "card", "registers", "spilled", "stack", "shared, KiB")


def cells(row: Row) -> list[str]:
    alike = len(row.configurations) - 1
    name = row.configurations[0] + (f" (and {alike} more)" if alike else "")
    shared = None if row.shared is None else f"{row.shared / KIB:.1f} / {row.shared_limit // KIB}"
    numbers = (row.registers, row.spilled, row.stack, shared)
    return [name, row.card, *("–" if number is None else str(number) for number in numbers)]


def show(rows: Sequence[Row]) -> bool:
    """Print a table for each kernel, then what is broken; whether every required bar holds."""
    console = Console()
    kernels = dict.fromkeys(row.kernel for row in rows)
    for kernel in kernels:
        lines = [cells(row) for row in rows if row.kernel == kernel]
        console.print(Markdown(f"**{kernel}**\n\n{table(HEADINGS, lines)}"))
    for row in rows:
        for reason in row.broken:
            mark = "BROKEN" if row.required else "shown only"
            click.echo(f"{mark}: {row.kernel} on {row.card}, {row.configurations[0]}: {reason}")
    failed = sum(bool(row.broken) for row in rows if row.required)
    verdict = f"{failed} of them break a bar" if failed else "all bars hold"
    cards = len({row.card for row in rows})
    click.echo(f"{len(kernels)} kernels, {cards} cards, {len(rows)} programs: {verdict}")
    return not failed


KNOWN = "; ".join(f"{card.name} {card.examples}" for card in CARDS.values())


@click.command(context_settings=cli.SETTINGS)
@click.option(
    "--card", "names", type=click.Choice(list(CARDS)), multiple=True, help=f"Only this card, or these: {KNOWN}."
)
@click.option("--kernel", default="", help="Only kernels whose name contains this, as in --kernel ppo.triton:policy.")
@click.option("--typical", is_flag=True, help="Only the configurations that most users run: a minute, not ten.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write all rows there.")
def command(names: Sequence[str], kernel: str, typical: bool, file: Path | None) -> None:
    """Compile every Triton kernel at real sizes for every card; no GPU is needed.

    For each program the table has the registers of a thread, the bytes it spills and its stack, and the shared memory
    of a block against the most that the card gives one. A program is a kernel as Triton specialises it: sizes and
    options that come down to the same machine code share a line.

    The bars: it compiles; no spills, no stack; shared memory and grid within the card's limits. The exit status is 1
    if one is broken. For gfx942 they are shown, not required.

    \b
    python -m benchmarks.cards --typical                      a minute: is anything wrong?
    python -m benchmarks.cards --card sm_89                   all sizes and options on an RTX 4090
    python -m benchmarks.cards --kernel tiled --card sm_90    one kernel, while tuning its blocks
    """
    if (missing := unavailable_reason(torch.device("meta"))) is not None:
        raise click.UsageError(missing)
    if interpreted():
        raise click.UsageError("TRITON_INTERPRET is set: the interpreter replaces the compiler; unset it.")
    configurations = [c for launches in LAUNCHES for c in launches() if c.typical or not typical]
    todo = programs(configurations, [CARDS[name] for name in names or CARDS], kernel)
    if not todo:
        raise click.UsageError(f"--kernel {kernel}: no kernel has that in its name.")
    workers = len(os.sched_getaffinity(0))
    with click.progressbar(measure_all(todo, workers), length=len(todo), file=sys.stderr) as found:
        rows = dict(found)
    ordered = [rows[index] for index in sorted(rows, key=lambda i: (rows[i].kernel, i))]
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in ordered], indent=1) + "\n", encoding="utf-8")
    if not show(ordered):
        sys.exit(1)


if __name__ == "__main__":
    command()
