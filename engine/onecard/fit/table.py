"""The answer of `onecard fit` as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from onecard.fit.cards import GIB, context, fragmentation
from onecard.fit.phases import CACHE, GRADIENTS, STATES
from onecard.fit.plan import ADAPTERS, WEIGHTS, Plan
from onecard.fit.search import flags
from onecard.fit.tracker import WORK

if TYPE_CHECKING:
    from onecard.fit.command import Answer

COLUMNS = {
    WEIGHTS: "weights",
    ADAPTERS: "adapters",
    GRADIENTS: "gradients",
    STATES: "states",
    CACHE: "cache",
    WORK: "work",
}


def shown(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def table_of(plan: Plan) -> Table:
    """A row for each phase: its peak, and what that is made of."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("phase, GiB", no_wrap=True)
    for title in ("peak", *COLUMNS.values()):
        table.add_column(title, justify="right")
    for phase in plan.phases:
        style = "bold" if phase is plan.highest else ""
        parts = (shown(phase.parts.get(kind, 0)) for kind in COLUMNS)
        table.add_row(phase.name, shown(phase.peak), *parts, style=style)
    return table


def print_answer(found: Answer) -> None:
    """Phases, the sum with what is not the run's own, and whether that is too much."""
    console = Console(highlight=False)
    lengths, plan, card = found.lengths, found.plan, found.card
    console.print(
        f"{found.model}, {found.algorithm}: {lengths.prompt} + {lengths.response} tokens, "
        f"{plan.trained:,} trained parameters"
    )
    console.print(table_of(plan))
    extra = f"{shown(context())} context + {shown(fragmentation(plan.peak))} fragmentation"
    total = plan.peak + context() + fragmentation(plan.peak)
    console.print(
        f"{shown(plan.peak)} allocated at most ({plan.highest.name}) + {extra} = {shown(total)} GiB", soft_wrap=True
    )
    if plan.paged:
        console.print(f"not among it: {shown(plan.paged)} of paged optimizer states, which may leave the card")
    if card is None:
        return
    if found.fits:
        console.print(f"yes: {card.name} has {shown(card.usable)} GiB to give.", style="bold")
    else:
        console.print(f"no: {card.name} has {shown(card.usable)} GiB to give.", style="bold")
    if found.fitting is not None:
        needed = card.needed(found.fitting.plan.peak)
        console.print(f"It fits with {flags(found.fitting.changed)}: {shown(needed)} GiB.", soft_wrap=True)
    if found.tokens is not None:
        console.print(f"Largest --micro_batch_tokens that fits: {found.tokens}")
