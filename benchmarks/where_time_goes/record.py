"""What a run leaves: JSON, and the Markdown made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records, tables
from benchmarks.render import table
from benchmarks.where_time_goes.costs import Cost, kind, largest
from benchmarks.where_time_goes.costs import Phase as Found
from benchmarks.where_time_goes.iteration import Measured

BENCHMARK, SCHEMA = "where-time-goes", 1
TOP = 12  # operators of a phase
COSTS = 12


@dataclass(frozen=True)
class Operator:
    """Of a phase's profiled part: the seconds are the profiler's, scaled to the phase."""

    name: str
    kind: str
    seconds: float
    count: float  # calls, scaled too
    flops: float  # of products; 0 where nobody counts them


@dataclass(frozen=True)
class Phase:
    """A phase: `seconds` by the stopwatch, `busy` the share of them in which an operator (on a GPU: a kernel) ran."""

    name: str
    seconds: float
    share: float  # of the iteration
    tokens: int
    flops: int  # that it cannot do without
    of_rate: float  # of the products' rate at which those were done
    busy: float
    launches: float
    synchronisations: float
    profiled: float  # the share of the phase that was profiled
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Report:
    device: str
    machine: str
    folder: str
    case: str
    model: str
    parameters: int
    dtype: str
    settings: dict[str, Any]
    quick: bool
    date: str
    commit: str
    dirty: bool
    load: float
    versions: dict[str, str]
    seconds: float  # of the iteration, by the stopwatch alone
    profiled_seconds: float  # of the one that was profiled
    rate: float  # FLOP/s of bare products
    bandwidth: float  # bytes/s of a plain copy
    phases: tuple[Phase, ...]
    costs: tuple[Cost, ...]  # the largest first
    schema: int = SCHEMA
    benchmark: str = BENCHMARK


def phase_of(found: Found, whole: float, rate: float, tokens: int, device: str) -> Phase:
    scale, digest = found.scale, found.digest
    top = sorted(digest.operators.items(), key=lambda item: -item[1].seconds)[:TOP]
    return Phase(
        name=found.name,
        seconds=found.seconds,
        share=found.seconds / whole,
        tokens=tokens,
        flops=found.flops,
        of_rate=found.flops / found.seconds / rate,
        busy=found.busy(device),
        launches=digest.launches * scale,
        synchronisations=digest.synchronisations * scale,
        profiled=found.part_seconds / found.seconds,
        operators=tuple(
            Operator(name, kind(name), found.seconds_of(each.seconds, device), each.count * scale, each.flops * scale)
            for name, each in top
        ),
    )


def results(found: Measured, device: str) -> dict[str, Any]:
    """The entries of a report that were measured."""
    phases = [phase_of(each, found.seconds, found.rate, found.tokens[each.name], device) for each in found.phases]
    return {
        "seconds": found.seconds,
        "profiled_seconds": found.profiled_seconds,
        "rate": found.rate,
        "bandwidth": found.bandwidth,
        "phases": tuple(phases),
        "costs": tuple(largest(found.phases, device, found.rate, COSTS)),
    }


def report_of(values: dict[str, Any]) -> Report:
    phases = tuple(
        Phase(**{**each, "operators": tuple(Operator(**operator) for operator in each["operators"])})
        for each in values.pop("phases")
    )
    return Report(phases=phases, costs=tuple(Cost(**each) for each in values.pop("costs")), **values)


def load(path: Path) -> Report:
    expected = {"benchmark": BENCHMARK, "schema": SCHEMA}
    return records.read(path, "report of benchmarks.where_time_goes", expected, report_of)


def provenance(report: Report) -> str:
    """One line: where, when, and from which code."""
    return tables.provenance_of(report, "one iteration, wall time", read="shares")


def phase_table(report: Report) -> str:
    on_gpu = report.device == "cuda"
    headings = ["phase", "seconds", "share", "of GEMM rate", "GPU busy" if on_gpu else "in operators"]
    lines = [
        [
            each.name,
            f"{each.seconds:.3g}",
            f"{each.share:.0%}",
            f"{each.of_rate:.1%}" if each.flops else "–",
            f"{each.busy:.0%}",
            *([f"{each.launches:,.0f}", f"{each.synchronisations:,.0f}"] if on_gpu else []),
        ]
        for each in report.phases
    ]
    return table([*headings, *(["launches", "synchronisations"] if on_gpu else [])], lines)


def cost_table(report: Report, costs: Sequence[Cost]) -> str:
    lines = [[each.what, each.phase, f"{each.seconds:.3g}", f"{each.seconds / report.seconds:.1%}"] for each in costs]
    return table(["cost", "phase", "seconds", "of the iteration"], lines)


def operator_table(phase: Phase) -> str:
    lines = [
        [
            each.name,
            f"{each.seconds:.3g}",
            f"{each.seconds / phase.seconds:.1%}",
            f"{each.count:,.0f}",
            f"{each.flops / each.seconds / 1e9:,.0f}" if each.flops and each.seconds else "–",
            each.kind,
        ]
        for each in phase.operators
    ]
    return table(["operator", "seconds", "of the phase", "calls", "GFLOP/s", "counted as"], lines)


def markdown(report: Report, name: str) -> str:
    """All of a run."""
    parts = [
        f"# Where the time of a PPO iteration goes: {report.case}, on {report.folder}",
        provenance(report),
        f"{report.model}, {report.parameters / 1e6:,.0f}M parameters, {report.dtype}; {report.seconds:.3g} s an "
        f"iteration ({report.profiled_seconds:.3g} s while profiled); bare products {report.rate / 1e12:.3g} TFLOP/s, "
        f"a plain copy {report.bandwidth / 1e9:.3g} GB/s.",
        f"Made from {name} by `python -m benchmarks.where_time_goes --render`; how to read it: the README of "
        "`benchmarks/`.",
        phase_table(report),
        "## Largest avoidable costs",
        cost_table(report, report.costs),
    ]
    for phase in report.phases:
        parts += [f"## {phase.name[0].upper()}{phase.name[1:]}", operator_table(phase)]
        if phase.profiled < 0.99:
            parts.append(f"Profiled: {phase.profiled:.0%} of the phase; the figures are scaled to all of it.")
    return "\n\n".join(parts) + "\n"


def render(path: Path) -> list[Path]:
    """The Markdown beside a report."""
    made = path.with_suffix(".md")
    records.write_atomically(made, markdown(load(path), path.name).encode())
    return [made]
