"""`onecard fit`: plan a run and print the answer, as text or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from onecard.commands.fit.answer import Answer, answer
from onecard.commands.fit.cards import GIB, context, fragmentation
from onecard.commands.fit.phases import CACHE, GRADIENTS, STATES
from onecard.commands.fit.plan import ADAPTERS, WEIGHTS, Plan
from onecard.commands.fit.search import flags
from onecard.commands.fit.tracker import WORK
from onecard.config import FitConfig, TrainConfig

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


def as_json(found: Answer) -> dict[str, Any]:
    """The answer as plain data; sizes in GiB."""
    plan, card = found.plan, found.card
    record: dict[str, Any] = {
        "model": found.model,
        "algorithm": found.algorithm,
        **{f"{name}_length": value for name, value in asdict(found.lengths).items()},
        **plan_as_json(plan),
        "context_gib": gib(context()),
        "fragmentation_gib": gib(fragmentation(plan.peak)),
    }
    if card is None:
        return record
    record |= {"card": card.name, "card_gib": gib(card.memory), "usable_gib": gib(card.usable)}
    record |= {"needed_gib": gib(card.needed(plan.peak)), "fits": found.fits, "micro_batch_tokens": found.tokens}
    if found.fitting is not None:
        needed = gib(card.needed(found.fitting.plan.peak))
        record["with"] = {"settings": found.fitting.changed, **plan_as_json(found.fitting.plan), "needed_gib": needed}
    return record


def plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        "weights_gib": gib(plan.parameters),
        "trained_parameters": plan.trained,
        "peak_gib": gib(plan.peak),
        "peak_phase": plan.highest.name,
        "paged_gib": gib(plan.paged),
        "phases": {
            phase.name: {"peak_gib": gib(phase.peak), **{kind: gib(size) for kind, size in phase.parts.items()}}
            for phase in plan.phases
        },
        "seconds": round(plan.seconds, 1),
    }


def gib(size: int) -> float:
    return round(size / GIB, 4)


def run(fit: FitConfig, config: TrainConfig) -> Answer:
    """`onecard fit`."""
    found = answer(fit, config)
    if fit.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print_answer(found)
    return found
