"""`onecard fit`: plan the memory of a training run and print the result, as text or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from onecard.commands.fit.cards import GIB, context_bytes, fragmentation_bytes
from onecard.commands.fit.phases import CACHE, GRADIENTS, STATES
from onecard.commands.fit.plan import ADAPTERS, WEIGHTS, MemoryPlan
from onecard.commands.fit.result import FitResult, plan_and_search
from onecard.commands.fit.search import flags
from onecard.commands.fit.tracker import ACTIVATIONS
from onecard.config import FitConfig, TrainConfig

COLUMNS = {
    WEIGHTS: "weights",
    ADAPTERS: "adapters",
    GRADIENTS: "gradients",
    STATES: "optimizer",
    CACHE: "KV cache",
    ACTIVATIONS: "activations",
}


def format_gib(size: int) -> str:
    """Bytes as GiB with two decimals; an empty string for 0."""
    return f"{size / GIB:.2f}" if size else ""


def table_of(plan: MemoryPlan) -> Table:
    """One row for each phase: its peak in GiB, and how much of it each kind of memory takes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("phase, GiB", no_wrap=True)
    for title in ("peak", *COLUMNS.values()):
        table.add_column(title, justify="right")
    for phase in plan.phases:
        style = "bold" if phase is plan.highest else ""
        parts = (format_gib(phase.parts.get(kind, 0)) for kind in COLUMNS)
        table.add_row(phase.name, format_gib(phase.peak), *parts, style=style)
    return table


def print_result(result: FitResult) -> None:
    """Print the phases, the peak with CUDA context and fragmentation added, and whether the run fits on the card."""
    console = Console(highlight=False)
    lengths, plan, card = result.lengths, result.plan, result.card
    console.print(
        f"{result.model}, {result.algorithm}: {lengths.prompt} + {lengths.response} tokens, "
        f"{plan.trained:,} trained parameters"
    )
    console.print(table_of(plan))
    extra = f"{format_gib(context_bytes())} context + {format_gib(fragmentation_bytes(plan.peak))} fragmentation"
    total = plan.peak + context_bytes() + fragmentation_bytes(plan.peak)
    console.print(
        f"peak: {format_gib(plan.peak)} allocated ({plan.highest.name}) + {extra} = {format_gib(total)} GiB",
        soft_wrap=True,
    )
    if plan.paged:
        console.print(f"not included: {format_gib(plan.paged)} GiB of paged optimizer states (can move to the host)")
    if card is None:
        return
    verdict = "fits" if result.fits else "does not fit"
    console.print(f"{verdict}: {format_gib(card.usable)} GiB of {card.name} are usable.", style="bold")
    if result.search is not None:
        needed = card.needed(result.search.plan.peak)
        console.print(f"fits with {flags(result.search.changed)}: {format_gib(needed)} GiB", soft_wrap=True)
    if result.micro_batch_tokens is not None:
        console.print(f"largest --micro_batch_tokens that fits: {result.micro_batch_tokens}")


def as_json(result: FitResult) -> dict[str, Any]:
    """The result as JSON data; sizes in GiB."""
    plan, card = result.plan, result.card
    record: dict[str, Any] = {
        "model": result.model,
        "algorithm": result.algorithm,
        **{f"{name}_length": value for name, value in asdict(result.lengths).items()},
        **plan_as_json(plan),
        "context_gib": gib(context_bytes()),
        "fragmentation_gib": gib(fragmentation_bytes(plan.peak)),
    }
    if card is None:
        return record
    record |= {"card": card.name, "card_gib": gib(card.memory), "usable_gib": gib(card.usable)}
    record |= {"needed_gib": gib(card.needed(plan.peak)), "fits": result.fits}
    record |= {"micro_batch_tokens": result.micro_batch_tokens}
    if result.search is not None:
        needed = gib(card.needed(result.search.plan.peak))
        record["with"] = {"settings": result.search.changed, **plan_as_json(result.search.plan), "needed_gib": needed}
    return record


def plan_as_json(plan: MemoryPlan) -> dict[str, Any]:
    """A plan as JSON data; sizes in GiB."""
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
    """Bytes as GiB, rounded to four decimals."""
    return round(size / GIB, 4)


def run(fit: FitConfig, config: TrainConfig) -> FitResult:
    """`onecard fit`. Returns what it printed."""
    result = plan_and_search(fit, config)
    if fit.json:
        print(json.dumps(as_json(result), indent=2))
    else:
        print_result(result)
    return result
