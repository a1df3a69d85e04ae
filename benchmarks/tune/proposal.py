"""What a sweep says: in each case the best setting, and for each knob the one to put in place of the default, if any.

A setting counts as faster only where its upper quartile lies below the default's lower one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import tables
from benchmarks.anatomy import OURS
from benchmarks.measure import LEAST_ROUNDS, Spread
from benchmarks.records import LIMIT, Result, Row
from benchmarks.tune.knobs import KNOBS, Knob

FASTER, WITHIN, DEFAULT = "faster", "within the spread", "the default is best"
TOO_LARGE = "fastest, but over the workspace that was promised"


@dataclass(frozen=True)
class Best:
    """The fastest setting of a case, and whether that means something."""

    knob: str
    default: Row
    row: Row
    ratio: Spread  # its time over the default's, round by round
    verdict: str


@dataclass(frozen=True)
class Proposal:
    knob: str
    setting: str
    ratio: float  # of times, the geometric mean over the knob's cases
    line: str


def faster(row: Row, other: Row) -> bool:
    """Beyond the spread of both; a round or two have none."""
    if min(len(row.seconds), len(other.seconds)) < LEAST_ROUNDS:
        return False
    return row.q3 is not None and other.q1 is not None and row.q3 < other.q1


def timed_settings(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.role != LIMIT and row.candidate != OURS and row.median is not None]


def beyond(row: Row, result: Result) -> int:
    """Peak memory without the gradient of the hidden states, where there is one."""
    itemsize = getattr(torch, result.dtype).itemsize
    returned = row.sizes["N"] * row.sizes["D"] * itemsize if "dHidden" in row.errors else 0
    return (row.peak_bytes or 0) - returned


def kept_small(knob: Knob, row: Row, result: Result) -> bool:
    return knob.workspace is None or beyond(row, result) <= knob.workspace


def best_of(result: Result) -> Iterator[Best]:
    """For each case of a knob in which the default and a setting were timed."""
    knob = KNOBS[result.benchmark]
    for rows in tables.cases(result.rows).values():
        default, settings = tables.ours_of(rows), timed_settings(rows)
        if default.median is None or not settings:
            continue
        row = min(settings, key=lambda row: row.median or math.inf)
        verdict = FASTER if faster(row, default) else WITHIN if (row.median or 0) < default.median else DEFAULT
        if verdict == FASTER and not kept_small(knob, row, result):
            verdict = TOO_LARGE
        ratio = tables.ratio(row, default)
        assert ratio is not None  # both were timed in the same rounds
        yield Best(knob.name, default, row, ratio, verdict)


def proposed(result: Result, device: str) -> Proposal | None:
    """The setting with the best mean ratio among those that are right, small enough and nowhere slower than the
    default, and in at least one case faster, both beyond the spread."""
    knob = KNOBS[result.benchmark]
    cases = [rows for rows in tables.cases(result.rows).values() if tables.ours_of(rows).median is not None]
    found: list[Proposal] = []
    for label in dict.fromkeys(row.candidate for rows in cases for row in timed_settings(rows)):
        values = knob.named(label)
        pairs = [
            (row, tables.ours_of(rows)) for rows in cases for row in timed_settings(rows) if row.candidate == label
        ]
        if values is None or len(pairs) < len(cases):
            continue  # a default must run everywhere
        if not all(kept_small(knob, row, result) and not faster(default, row) for row, default in pairs):
            continue
        if not any(faster(row, default) for row, default in pairs):
            continue
        ratios = [ratio.median for row, default in pairs if (ratio := tables.ratio(row, default)) is not None]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found.append(Proposal(knob.name, label, mean, knob.line(values, [row for row, _ in pairs], device)))
    return min(found, key=lambda proposal: proposal.ratio, default=None)
