"""The plan beside the measured memory, and what is said of the steps that were made."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.render import table
from benchmarks.train_step import results
from benchmarks.train_step.planned import MOST_OFF, verdict
from benchmarks.train_step.results import Result

NONE = tables.NONE
MEMORY_HEADINGS = ("peak, MiB", "planned", "measured", "difference", f"within {MOST_OFF:.0%}",
                   "above what stays: planned", "measured", "difference")  # fmt: skip
LEAST_STEPS = 2  # whole ones, that a case under a cap has to make


def memory_lines(result: Result) -> list[list[str]]:
    """A line for each phase: what `onecard fit` says, and what was."""

    def difference(value: float | None) -> str:
        return NONE if value is None else f"{value:+.1%}"

    return [
        [
            each.phase,
            tables.mebibytes(each.planned),
            tables.mebibytes(each.measured),
            difference(each.off),
            NONE if each.off is None else "met" if abs(each.off) <= MOST_OFF else "missed",
            tables.mebibytes(each.planned_above),
            tables.mebibytes(each.measured_above),
            difference(results.off(each.planned_above, each.measured_above)),
        ]
        for each in result.memory
    ]


def memory_verdict(result: Result) -> str:
    """One line on the plan."""
    if result.unplanned:
        return f"No plan stands beside the memory: {result.unplanned}"
    return verdict(result.memory)


def steps_verdict(result: Result) -> str:
    """One line on the steps: how many, that they came to numbers, and whether memory held."""
    count = len(result.learned)
    where = f" under a cap of {result.cap_gib:g} GiB" if result.cap_gib else ""
    words = f"Whole steps{where}: {count}"
    if count:
        losses, norms = zip(*result.learned, strict=True)
        words += (
            f", loss {min(losses):.4g} to {max(losses):.4g}, gradient norm {min(norms):.4g} to {max(norms):.4g}, "
            "all finite"
        )
    if result.cap_gib and count < LEAST_STEPS:
        words += f"; MISSED, expected {LEAST_STEPS}"
    return words + ("; MEMORY RAN OUT, and passes were made smaller" if result.shrunk else "")


def memory_parts(result: Result) -> list[str]:
    """The plan's table and the verdicts; nothing of files from before there were plans in them."""
    if not (result.memory or result.unplanned or result.learned):
        return []
    found = [table(MEMORY_HEADINGS, memory_lines(result))] if result.memory else []
    return [*found, f"{memory_verdict(result)}. {steps_verdict(result)}."]
