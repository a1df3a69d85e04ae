"""`python -m benchmarks.cards`: compiles every Triton kernel for every card, without a GPU, and prints what it takes.

Registers, stack and shared memory are settled when a kernel is compiled, not when it runs, so a kernel that would
spill on one card, or not start on another for want of shared memory, is found here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch

from benchmarks.ahead import CARDS, KIB, Row, measure_all, programs
from benchmarks.launches import LAUNCHES
from benchmarks.render import table
from onecard_kernels.launch import interpreted, why_not


def line_of(row: Row) -> list[str]:
    alike = len(row.configurations) - 1
    shared = None if row.shared is None else f"{row.shared / KIB:.1f} / {row.shared_limit // KIB}"
    found = ["–" if x is None else str(x) for x in (row.registers, row.spilled, row.stack, shared)]
    return [row.configurations[0] + (f" (and {alike} more)" if alike else ""), row.card, *found]


def show(rows: Sequence[Row]) -> bool:
    """Print a table for each kernel, then what is broken; whether every bar holds that must."""
    kernels = dict.fromkeys(row.kernel for row in rows)
    for kernel in kernels:
        headings = ("configuration", "card", "registers", "spilled", "stack", "shared, KiB")
        lines = [line_of(row) for row in rows if row.kernel == kernel]
        click.echo(f"{kernel}\n{table(headings, lines, aligned=True)}\n")
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


@click.command(context_settings={"max_content_width": 100})
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
    if (missing := why_not(torch.device("meta"))) is not None:
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
