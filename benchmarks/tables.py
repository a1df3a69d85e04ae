"""From rows to the cells of a table. The terminal, the Markdown file and the README print the same strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.anatomy import OURS
from benchmarks.measure import Spread, spread
from benchmarks.records import LIMIT, Report, Row

NONE = "–"

Case = tuple[str, str]  # (shape's name, mode)


def cases(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    found: dict[Case, list[Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.mode), []).append(row)
    return found


def ours_of(rows: Iterable[Row]) -> Row:
    """Ours as it comes; its variants are rows of their own."""
    return next(row for row in rows if row.candidate == OURS)


def ratio(row: Row, ours: Row) -> Spread | None:
    """Time over our time, round by round: what slowed both in a round cancels."""
    if row.role == LIMIT and not row.gemms:
        return None  # a copy does other work
    if not row.seconds or len(row.seconds) != len(ours.seconds):
        return None
    return spread([theirs / mine for theirs, mine in zip(row.seconds, ours.seconds, strict=True)])


def number(value: float | None, form: str = ".3g") -> str:
    return NONE if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(count: int | None) -> str:
    return NONE if count is None else f"{count / 2**20:.1f}" if count < 100 << 20 else f"{count / 2**20:.0f}"


def rate(row: Row) -> str:
    """The limits' names carry what was measured with them."""
    if row.rate is None:
        return row.candidate
    scale, unit = (1e12, "TFLOP/s") if row.gemms else (1e9, "GB/s")
    return f"{row.candidate} ({row.rate / scale:.3g} {unit})"


@dataclass(frozen=True)
class Columns:
    """What the rows of a case have besides times: which errors, and whether launches were counted."""

    errors: tuple[str, ...]
    launches: bool

    @property
    def headings(self) -> list[str]:
        counted = ["launches"] if self.launches else []
        names = [f"error {name}" for name in self.errors]
        return ["", "time, ms", "quartiles", f"time / {OURS}", "of limit", "peak, MiB", *counted, *names]

    @property
    def brief_headings(self) -> list[str]:
        """For a terminal of 80 columns: one number a cell. Behind the results' names stand their errors."""
        return ["", "ms", "ratio", "limit", "MiB", *(["launches"] if self.launches else []), *self.errors]

    def cells(self, row: Row, ours: Row) -> list[str]:
        """One cell for each of the headings; a row that did not run has its reason in the second cell alone."""
        if row.reason is not None:
            return [row.candidate, row.reason, *[""] * (len(self.headings) - 2)]
        against = ratio(row, ours)
        return [
            rate(row),
            milliseconds(row.median),
            f"{milliseconds(row.q1)} to {milliseconds(row.q3)}",
            NONE if against is None else f"{against.median:.2f}x ({against.q1:.2f} to {against.q3:.2f})",
            share(row),
            mebibytes(row.peak_bytes),
            *self.rest(row, ".1e"),
        ]

    def brief(self, row: Row, ours: Row) -> list[str]:
        """One cell for each of the brief headings, of a row that ran."""
        against = ratio(row, ours)
        return [
            row.candidate,
            milliseconds(row.median),
            NONE if against is None else f"{against.median:.2f}x",
            share(row),
            mebibytes(row.peak_bytes),
            *self.rest(row, ".0e"),
        ]

    def rest(self, row: Row, form: str) -> list[str]:
        counted = [NONE if row.launches is None else str(row.launches)] if self.launches else []
        return [*counted, *(number(row.errors.get(name), form) for name in self.errors)]


def columns_of(rows: Sequence[Row]) -> Columns:
    errors = tuple(dict.fromkeys(name for row in rows for name in row.errors))
    return Columns(errors, any(row.launches is not None for row in rows))


def share(row: Row) -> str:
    if row.of_limit is None:
        return NONE
    return f"{row.of_limit:.0%}" if row.of_limit >= 0.01 else f"{row.of_limit:.2%}"


def size(row: Row) -> str:
    return " x ".join(map(str, row.sizes.values()))


def rounds(report: Any) -> str:
    counts = {len(row.seconds) for result in report.results for row in result.rows if row.seconds}
    if not counts:
        return "no"
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def provenance(report: Report) -> str:
    """One line: where, when, and from which code."""
    return provenance_of(report, f"median of {rounds(report)} interleaved calls, {report.clock}")


def provenance_of(report: Any, how: str, *, read: str = "ratios") -> str:
    """Of any report. A tree with changes and a run for show are said first. `read`: what of a CPU's numbers counts."""
    warnings = [
        text
        for text, on in (
            ("DIRTY TREE: these numbers belong to no commit", report.dirty),
            ("QUICK RUN: too small to conclude from", report.quick),
            ("CUT OFF: cases are missing", not getattr(report, "complete", True)),
            (f"CPU: read the {read}, not the times", report.device == "cpu"),
        )
        if on
    ]
    libraries = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    facts = (
        f"{report.machine}; commit {report.commit[:12]}; {report.date}; {how}; "
        f"load {report.load:.1f} at the start; {libraries}"
    )
    return ". ".join([*warnings, facts]) + "."
