"""One case, a shape in a mode: everybody is checked, then weighed, then timed in turns with everybody else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import candidates as peers
from benchmarks import measure, shapes, truth
from benchmarks.candidates import EAGER, OURS, Candidate
from benchmarks.records import LIMIT, Row
from benchmarks.shapes import Inputs, Shape

PASSES = 2  # the check and the memory pass

Tick = Callable[[str, int], None]


class Refused(Exception):
    """Ours is wrong, or does not run: there is nothing to time."""


def checked(
    candidate: Candidate, inputs: Inputs, mode: str, true: truth.Truth, eager: truth.Errors | None
) -> tuple[peers.LogProbs, truth.Errors]:
    """Runs a candidate once at full size and compares it with fp64. Raises Unavailable, or Refused for ours."""
    try:
        logprobs = candidate.load(inputs.hidden.device)
        errors = truth.errors_of(peers.run(logprobs, inputs, mode), true)
    except peers.Unavailable:
        raise
    except Exception as error:  # whatever a peer raises is the reason in its row
        raise peers.Unavailable(peers.one_line(error)) from error
    if candidate.name != OURS:
        wrong = truth.peer_objection(errors)
        if wrong is not None:
            raise peers.Unavailable(wrong)
    else:
        objections = truth.objections(errors, eager, inputs.hidden.dtype)
        if objections:
            raise Refused(f"{candidate.name} is wrong in mode {mode}: {'; '.join(objections)}. Nothing is timed.")
    return logprobs, errors


def limit_rows(
    blank: Row, sets: Sequence[Inputs], itemsize: int, shape: Shape
) -> dict[str, tuple[Row, list[measure.Work], int]]:
    """name -> (row without times, works, FLOPs or bytes of one call): bare GEMMs, and a copy."""
    work = shapes.work_of(shape, blank.mode, itemsize)
    device = sets[0].hidden.device
    gemm_row = replace(blank, candidate=f"bare GEMMs, {work.gemms}u", role=LIMIT, gemms=work.gemms)
    copy, moved = measure.copy_work(device)
    return {
        gemm_row.candidate: (gemm_row, [measure.gemm_work(s.hidden, s.weight, work.gemms) for s in sets], work.flops),
        "copy": (replace(blank, candidate="copy", role=LIMIT), [copy], moved),
    }


def measure_case(
    shape: Shape,
    mode: str,
    sets: Sequence[Inputs],
    true: truth.Truth,
    chosen: Sequence[Candidate],
    *,
    repeats: int,
    warmup: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    tick: Tick = lambda name, steps: None,
) -> list[Row]:
    """Checks everybody, then takes the memory of everybody, then times everybody in turns."""
    inputs, device = sets[0], sets[0].hidden.device
    blank = Row(shape.name, shape.tokens, shape.hidden, shape.vocab, mode, candidate="", role="peer")
    rows: dict[str, Row] = {}
    works: dict[str, list[measure.Work]] = {}
    eager: truth.Errors | None = None
    # Eager comes first: its error is the yardstick of our gradients. The table keeps the order of `chosen`.
    for candidate in sorted(chosen, key=lambda candidate: candidate.name != EAGER):
        name, ours = candidate.name, candidate.name == OURS
        tick(name, 1)
        row = replace(blank, candidate=name, role="ours" if ours else "peer")
        try:
            logprobs, errors = checked(candidate, inputs, mode, true, eager)
        except peers.Unavailable as reason:
            if ours:
                raise Refused(f"{name} does not run in mode {mode} at {shape}: {reason}") from reason
            rows[name] = replace(row, reason=str(reason))
            tick(name, repeats + warmup + PASSES - 1)
            continue
        eager = errors if name == EAGER else eager
        works[name] = peers.works(logprobs, list(sets), mode)
        tick(name, 1)
        rows[name] = replace(
            row,
            error_logprobs=errors.logprobs,
            error_hidden=errors.hidden,
            error_weight=errors.weight,
            peak_bytes=measure.peak_bytes(works[name][0], device),
        )
    limits = limit_rows(blank, sets, inputs.hidden.element_size(), shape)
    ordered = {candidate.name: works[candidate.name] for candidate in chosen if candidate.name in works}
    times = measure.interleave(
        {**ordered, **{name: made for name, (_, made, _) in limits.items()}},
        measure.stopwatch(device, clock),
        repeats=repeats,
        warmup=max(warmup, 1),  # the limits were not run before
        tick=lambda name: tick(name, 1),
    )
    done = [timed(rows[candidate.name], times.get(candidate.name)) for candidate in chosen]
    bare = [timed(row, times[name], units) for name, (row, _, units) in limits.items()]
    return with_share(done + bare, shapes.work_of(shape, mode, inputs.hidden.element_size()))


def timed(row: Row, seconds: list[float] | None, units: int | None = None) -> Row:
    if seconds is None:
        return row
    found = measure.spread(seconds)
    rate = None if units is None else units / found.median
    return replace(row, seconds=tuple(seconds), median=found.median, q1=found.q1, q3=found.q3, rate=rate)


def with_share(rows: list[Row], work: shapes.Work) -> list[Row]:
    """Adds the share of the limit: the time of the unavoidable work at the rates just measured, over the time taken."""
    gemm_rate = next(row.rate for row in rows if row.gemms)
    copy_rate = next(row.rate for row in rows if row.role == LIMIT and not row.gemms)
    least = max(work.flops / gemm_rate, work.bytes / copy_rate)
    return [
        replace(row, of_limit=least / row.median) if row.median is not None and row.candidate != "copy" else row
        for row in rows
    ]
