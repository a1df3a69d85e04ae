"""What a run leaves: one JSON file, in which every number of the tables stands."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import measure, records

SCHEMA = 1
BENCHMARK = "train-step"
PACKAGES = ("peft", "accelerate", "bitsandbytes")
OURS = "onecard"


@dataclass(frozen=True)
class Row:
    """A candidate of a DPO case, or a phase of a PPO iteration. Without times when it could not run: then `reason`."""

    name: str
    role: str  # ours | peer | limit
    reason: str | None = None
    seconds: tuple[float, ...] = ()  # each round
    tokens: tuple[int, ...] = ()  # of those rounds: the same for all candidates
    flops: tuple[int, ...] = ()  # what those rounds cannot do without
    peak_bytes: int | None = None  # above what was held before the step
    held_bytes: int | None = None  # weights, adapters and optimizer
    first: dict[str, float] = field(default_factory=dict)  # what the first step logged


@dataclass(frozen=True)
class Memory:
    """The peak of a phase, in bytes, as `onecard fit` plans it and as it was: all at once, and above what stays between
    steps. None: not measured.
    """

    phase: str
    planned: int
    planned_above: int
    measured: int | None = None
    measured_above: int | None = None

    @property
    def off(self) -> float | None:
        """How far the plan is from the measured peak, as a share of that."""
        return off(self.planned, self.measured)


def off(planned: int, measured: int | None) -> float | None:
    return (planned - measured) / measured if measured else None


@dataclass(frozen=True)
class Result:
    """One case."""

    kind: str  # dpo | ppo
    name: str
    model: str
    parameters: int
    dtype: str
    sizes: dict[str, int]
    mixed: bool
    settings: dict[str, Any]
    cap_gib: float
    in_turns: bool  # candidates took turns; else one came after the other, each alone in memory
    rows: tuple[Row, ...] = ()
    refused: str | None = None
    memory: tuple[Memory, ...] = ()
    unplanned: str | None = None  # why no plan stands beside the measured memory
    learned: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of each whole step of ours, in their order
    shrunk: bool = False  # memory ran out, and passes were made smaller than the settings say


@dataclass(frozen=True)
class Report:
    device: str
    machine: str
    folder: str
    quick: bool
    complete: bool
    clock: str
    date: str
    commit: str
    dirty: bool
    load: float
    versions: dict[str, str]
    results: tuple[Result, ...] = ()
    schema: int = SCHEMA
    benchmark: str = BENCHMARK


def versions() -> dict[str, str]:
    """Of all that takes part."""
    found = records.versions()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def file_name(report: Report) -> str:
    """Sorts by date, and names the code."""
    return records.stamped(BENCHMARK, report.date, report.commit, dirty=report.dirty, quick=report.quick)


def report_of(values: dict[str, Any]) -> Report:
    return Report(results=tuple(result_of(found) for found in values.pop("results")), **values)


def load(path: Path) -> Report:
    expected = {"benchmark": BENCHMARK, "schema": SCHEMA}
    return records.read(path, "report of benchmarks.train_step", expected, report_of)


def result_of(values: dict[str, Any]) -> Result:
    lists = ("seconds", "tokens", "flops")
    rows = tuple(Row(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in values["rows"])
    more = {
        "memory": tuple(Memory(**each) for each in values.get("memory", ())),
        "learned": tuple((loss, norm) for loss, norm in values.get("learned", ())),
    }
    return Result(**{**values, **more, "rows": rows})


def rate(row: Row) -> measure.Spread | None:
    """Tokens per second."""
    return per_second(row.tokens, row.seconds)


def per_second(amounts: Sequence[int], seconds: Sequence[float]) -> measure.Spread | None:
    if not seconds or not amounts:
        return None
    return measure.spread([amount / taken for amount, taken in zip(amounts, seconds, strict=True)])


def speed_over(row: Row, other: Row) -> measure.Spread | None:
    """How often as fast a row is as another, round by round: what slowed a round falls on both."""
    pairs = list(zip(row.seconds, other.seconds, strict=False))  # a slower one, timed alone, may have fewer rounds
    return measure.spread([theirs / mine for mine, theirs in pairs]) if pairs else None


def utilisation(row: Row, limit: Row | None) -> float | None:
    """The share of the bare products' rate, measured in the same run, at which the unavoidable FLOPs were done."""
    mine, most = per_second(row.flops, row.seconds), limit and per_second(limit.flops, limit.seconds)
    return mine.median / most.median if mine and most else None


def named(result: Result, name: str) -> Row | None:
    return next((row for row in result.rows if row.name == name), None)


def title(report: Report, result: Result) -> str:
    cap = f", capped at {result.cap_gib:g} GiB on {report.machine.split(',')[0]}" if result.cap_gib else ""
    return f"{result.kind.upper()}: {result.name}{cap}"
