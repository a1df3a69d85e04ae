"""`python -m benchmarks.render FILE.json...`: Markdown and plots of a report, and its tables in regions of pages.

All benchmarks share one table: a line for each row, and a column for each value that any row of the case has.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import cli, records, targets
from benchmarks.measure import Spread
from benchmarks.records import LIMIT, OURS, WHOLE, Case, Report, Row

NONE = "–"
COLOURS = {"ours": "#1b7837", "peer": "#9e9e9e", LIMIT: "#d9d9d9"}
ROLLOUT_TARGET = 2.0  # times the tokens per second of generate, on mixed lengths
MOST_OFF = 0.05  # of a measured peak, by which the memory plan may be off
LOG_WIDTH = 160  # columns of what is printed into a file
LEAST_STEPS = 2  # whole ones, of a case under a memory cap


# --- cells


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(count: int | None) -> str:
    return NONE if count is None else f"{count / 2**20:.1f}" if count < 100 << 20 else f"{count / 2**20:.0f}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}" if value >= 0.01 else f"{value:.2%}"


def median(value: Spread | None, form: str = ",.0f") -> str:
    return NONE if value is None else format(value.median, form)


def ranged(value: Spread | None, form: str = ",.0f", unit: str = "") -> str:
    """The median, and the quartiles of more than one value."""
    if value is None or value.count == 1:
        return NONE if value is None else f"{value.median:{form}}{unit}"
    return f"{value.median:{form}}{unit} ({value.q1:{form}} to {value.q3:{form}})"


def factor(value: Spread | None) -> str:
    return ranged(value, ".2f", "x")


def whole_bytes(row: Row) -> int | None:
    """Peak memory with the weights."""
    return None if row.peak_bytes is None or row.held_bytes is None else row.peak_bytes + row.held_bytes


def named(row: Row) -> str:
    """The name; a limit's has the measured rate."""
    if row.rate is None:
        return row.name
    scale, unit = (1e12, "TFLOP/s") if row.gemms else (1e9, "GB/s")
    return f"{row.name} ({row.rate / scale:.3g} {unit})"


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [[value.replace("|", "\\|") for value in row] for row in (headings, *lines)]
    rows.insert(1, ["---", *["---:"] * (len(headings) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- a case


def size(case: Case) -> str:
    return " x ".join(map(str, case.sizes.values()))


def columns(case: Case) -> dict[str, Callable[[Row], str]]:
    """Heading -> cell, of everything that a row may have. Times are relative to our row."""
    base = case.row(OURS) or case.row(WHOLE) or next(iter(case.rows), None)
    step = case.found.get("step")  # of a rollout
    step_seconds: dict[str, float] = step["seconds"] if step else {}

    def times(row: Row) -> str:
        if row.name == "copy" or base is None or step is not None:
            return NONE  # a copy does other work, and two samplers other numbers of tokens
        return factor(records.ratio(row, base))

    def quartiles(row: Row) -> str:
        found = row.time
        return NONE if found is None or found.count == 1 else f"{milliseconds(found.q1)} to {milliseconds(found.q3)}"

    def reading(row: Row) -> str:
        taken = step_seconds.get(row.name)
        return percent(step["bytes_read"] / step["bandwidth"] / taken) if step and taken else NONE

    def more(name: str, form: str = ",.0f") -> Callable[[Row], str]:
        return lambda row: format(row.more[name], form) if name in row.more else NONE

    def error(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row.errors[name]:.1e}" if name in row.errors else NONE

    return {
        "time, ms": lambda row: milliseconds(row.time and row.time.median),
        "quartiles": quartiles,
        f"time / {base.name if base else OURS}": times,
        "tokens/s": lambda row: ranged(row.token_rate),
        "of limit": lambda row: percent(records.share_of_limit(row, case)),
        "ms a step": lambda row: milliseconds(step_seconds.get(row.name)),
        "of the reading's rate": reading,
        "peak, MiB": lambda row: mebibytes(row.peak_bytes),
        "with weights, MiB": lambda row: mebibytes(whole_bytes(row)),
        "busy": more("busy", ".0%"),
        "launches": lambda row: NONE if row.launches is None else str(row.launches),
        "launches a phase": more("launches"),
        "synchronisations": more("synchronisations"),
        **{f"error {name}": error(name) for row in case.rows for name in row.errors},
    }


def case_table(case: Case) -> str:
    """The columns that are used. A row that did not run has its reason in the second cell."""
    ran = [row for row in case.rows if row.reason is None]
    used = {name: cell for name, cell in columns(case).items() if any(cell(row) != NONE for row in ran)}
    lines = []
    for row in case.rows:
        if row.reason is None:
            lines.append([named(row), *(cell(row) for cell in used.values())])
        else:
            lines.append([row.name, row.reason, *[""] * (len(used) - 1)][: 1 + max(len(used), 1)])
    return table(["", *used], lines)


def title(case: Case, report: Report) -> str:
    cap = case.about.get("cap_gib")
    capped = f", capped at {cap:g} GiB on {report.machine.split(',')[0]}" if cap else ""
    return f"{case.name}{capped}"


def heading(case: Case, report: Report) -> str:
    if case.mode:
        return f"{case.about['mode']}: {' x '.join(case.sizes)} = {size(case)} ({case.name})"
    return f"{case.what.upper() if case.what in ('dpo', 'ppo') else case.what}: {title(case, report)}"


def settings(case: Case) -> str:
    """Model, sizes and settings in a line."""
    if "state" in case.found:  # of the sanitizer
        return f"{case.found['state'].capitalize()}, {case.found['seconds']:.0f} s."
    about = {**case.about, **case.about.get("settings", {})}
    parts = [about.pop("operation", ""), about.pop("model", ""), case.dtype]
    if "parameters" in about:
        parts.append(f"{about.pop('parameters') / 1e6:,.0f}M parameters")
    if not case.mode:
        parts += [f"{name} {value:,}" for name, value in case.sizes.items()]
    for name, value in about.items():
        if name not in ("mode", "settings", "in_turns") and value:
            parts.append(name if value is True else f"{name} {value}")
    text = ", ".join(filter(None, parts))
    return f"{text[:1].upper()}{text[1:]}."


def off(planned: int, measured: int | None) -> float | None:
    """How far a planned peak is from the measured one, as a share of that."""
    return (planned - measured) / measured if measured else None


def memory_lines(memory: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Each phase as `onecard fit` plans it and as measured: in all, and above what stays between steps."""

    def compared(planned: int, measured: int | None) -> list[str]:
        distance = off(planned, measured)
        return [mebibytes(planned), mebibytes(measured), NONE if distance is None else f"{distance:+.1%}"]

    return [
        [
            each["phase"],
            *compared(each["planned"], each["measured"]),
            *compared(each["planned_above"], each["measured_above"]),
        ]
        for each in memory
    ]


def plan_verdict(case: Case) -> str:
    if case.found.get("unplanned"):
        return f"No plan stands beside the memory: {case.found['unplanned']}."
    distances = {each["phase"]: off(each["planned"], each["measured"]) for each in case.found.get("memory", ())}
    judged = {name: distance for name, distance in distances.items() if distance is not None}
    missed = [f"{name} ({distance:+.1%})" for name, distance in judged.items() if abs(distance) > MOST_OFF]
    verdict = f"missed in {', '.join(missed)}" if missed else "met in each phase" if judged else "nothing was measured"
    return f"Plan within {MOST_OFF:.0%}: {verdict}."


def steps_verdict(case: Case) -> str:
    """How many whole steps were made, that their losses are finite, and whether memory held."""
    losses_and_norms, cap = case.found.get("learned", ()), case.about.get("cap_gib")
    words = f"Whole steps{f' under a cap of {cap:g} GiB' if cap else ''}: {len(losses_and_norms)}"
    if losses_and_norms:
        losses, norms = zip(*losses_and_norms, strict=True)
        words += f", loss {min(losses):.4g} to {max(losses):.4g}, gradient norm {min(norms):.4g} to {max(norms):.4g}"
    if cap and len(losses_and_norms) < LEAST_STEPS:
        words += f"; MISSED, expected {LEAST_STEPS}"
    return words + ("; MEMORY RAN OUT, and passes were made smaller." if case.found.get("shrunk") else ".")


def rollout_ratio(case: Case) -> Spread | None:
    """Tokens per second of the first sampler over the last one's, round by round."""
    if len(case.rows) < 2:
        return None
    one, other = case.rows[0], case.rows[-1]
    rates = [[n / t for n, t in zip(row.tokens, row.seconds, strict=True)] for row in (one, other)]
    return records.spread([mine / theirs for mine, theirs in zip(*rates, strict=True)])


def rollout_note(case: Case) -> str:
    step, found = case.found["step"], rollout_ratio(case)
    reading = step["bytes_read"] / step["bandwidth"]
    words = f"Rollout tokens/s at least {ROLLOUT_TARGET:g}x plain generate on mixed lengths: "
    words += "not measured" if found is None else f"{found.median:.2f}x, "
    words += "" if found is None else "met" if found.median >= ROLLOUT_TARGET else "MISSED"
    return (
        f"{words}. A step: {step['rows']} rows with {step['length']:,} tokens each in the cache. Weights and cache are "
        f"{step['bytes_read'] / 2**20:,.0f} MiB, read in {milliseconds(reading)} ms at the "
        f"{step['bandwidth'] / 1e9:,.0f} GB/s of a plain copy in this run."
    )


def operators(row: Row) -> list[str]:
    """A phase's operators by time, and how much of the phase was profiled."""
    (seconds,) = row.seconds
    lines = [
        [
            each["name"],
            milliseconds(each["seconds"]),
            f"{each['seconds'] / seconds:.1%}",
            f"{each['count']:,.0f}",
            f"{each['flops'] / each['seconds'] / 1e9:,.0f}" if each["flops"] and each["seconds"] else NONE,
            each["kind"],
        ]
        for each in row.more["operators"]
    ]
    parts = [f"#### {row.name}", table(["operator", "ms", "of the phase", "calls", "GFLOP/s", "counted as"], lines)]
    if row.more["profiled"] < 0.99:
        parts.append(f"Profiled: {row.more['profiled']:.0%} of the phase; the figures are scaled to all of it.")
    return parts


MEMORY = ("peak, MiB", "planned", "measured", "difference", "above what stays: planned", "measured", "difference")
COSTS = ("avoidable cost", "phase", "ms", "of the iteration")


def notes(case: Case) -> list[str]:
    """What stands below a case's table."""
    found, parts = case.found, []
    if "learned" in found:
        if found.get("memory"):
            parts.append(table(MEMORY, memory_lines(found["memory"])))
        parts.append(f"{plan_verdict(case)} {steps_verdict(case)}")
    if found.get("step"):
        parts.append(rollout_note(case))
    if "costs" in found:
        parts.append(
            f"Profiled, the iteration took {found['profiled_seconds']:.3g} s. Bare products: "
            f"{found['rate'] / 1e12:.3g} TFLOP/s, a plain copy: {found['bandwidth'] / 1e9:.3g} GB/s."
        )
        whole = sum(case.rows[-1].seconds)  # the last row is the whole iteration
        lines = [
            [each["what"], each["phase"], milliseconds(each["seconds"]), f"{each['seconds'] / whole:.1%}"]
            for each in found["costs"]
        ]
        parts.append(table(COSTS, lines))
        parts += [part for row in case.rows if "operators" in row.more for part in operators(row)]
    return parts


def parts_of(case: Case, report: Report) -> list[str]:
    """A case: its heading, settings, table and notes."""
    parts = [f"### {heading(case, report)}", settings(case)]
    if case.refused is not None:
        return [*parts, f"REFUSED, nothing was timed: {case.refused}"]
    return [*parts, case_table(case), *notes(case)] if case.rows else parts


# --- a report


def rounds(report: Report) -> str:
    counts = sorted({len(row.seconds) for case in report.cases for row in case.rows if row.seconds})
    return "no" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def provenance(report: Report) -> str:
    """Where, when, and from which code; first what the numbers are not good for."""
    calls = "interleaved calls" if report.benchmark in ("kernels", "tune") else "rounds"
    profile = report.benchmark == "ppo-profile"
    how = f"{'one iteration' if profile else f'median of {rounds(report)} {calls}'}, {report.clock}"
    warnings = [
        text
        for text, on in (
            ("DIRTY TREE: these numbers belong to no commit", report.dirty),
            ("QUICK RUN: too small to conclude from", report.quick),
            ("CUT OFF: cases are missing", not report.complete),
            (f"CPU: read the {'shares' if profile else 'ratios'}, not the times", report.device == "cpu"),
        )
        if on
    ]
    libraries = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    facts = (
        f"{report.machine}; commit {report.commit[:12]}; {report.date}; {how}; "
        f"load {report.load:.1f} at the start; {libraries}"
    )
    return ". ".join([*warnings, facts]) + "."


def conclusions(report: Report) -> list[str]:
    """What a run met of the targets, or proposes."""
    if report.benchmark == "tune":
        from benchmarks import tune

        return ["## Proposal", tune.proposals(report)]
    judged = targets.verdicts(report)
    return ["## Targets", table(("target", "bar", "figure", ""), judged)] if judged else []


def markdown(report: Report, name: str) -> str:
    """All of a report."""
    parts = [
        f"# {report.benchmark} on {report.folder}",
        provenance(report),
        f"Made from {name} by `python -m benchmarks.render`; how to read it: the README of `benchmarks/`.",
    ]
    parts += conclusions(report)
    for what, cases in report.kinds.items():
        parts += [f"## {what}", *(part for case in cases for part in parts_of(case, report))]
    return "\n\n".join(parts) + "\n"


def plot(report: Report, cases: Sequence[Case]) -> bytes:
    """A line of two panels for each case: tokens per second or time, with quartiles; and peak memory."""
    figure = Figure(figsize=(11, 0.8 + 2.2 * len(cases)))
    grid = figure.subplots(len(cases), 2, squeeze=False)
    for (left, right), case in zip(grid, cases, strict=True):
        ran = [row for row in case.rows if row.seconds and row.name not in ("copy", WHOLE)][::-1]
        by_rate = bool(case.row(OURS)) and all(row.tokens for row in ran if row.role != LIMIT)
        ran = [row for row in ran if row.tokens] if by_rate else ran
        spreads = [row.token_rate if by_rate else records.spread([1e3 * taken for taken in row.seconds]) for row in ran]
        bars = [[each.median - each.q1 for each in spreads], [each.q3 - each.median for each in spreads]]
        names, colours = [row.name for row in ran], [COLOURS[row.role] for row in ran]
        left.barh(names, [each.median for each in spreads], xerr=bars, color=colours, capsize=3)
        label = "tokens/s" if by_rate else f"{report.clock}, ms"
        left.set(title=size(case) if case.mode else title(case, report), xlabel=f"{label} (median, quartiles)")
        held = [row for row in ran if row.peak_bytes is not None]
        peaks = [row.peak_bytes / 2**20 for row in held]
        bars = right.barh([row.name for row in held], peaks, color=[COLOURS[row.role] for row in held])
        right.bar_label(bars, labels=[mebibytes(row.peak_bytes) for row in held], padding=3)
        right.set(xlabel="peak memory above what was held before, MiB")
        right.margins(x=0.18)
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
    warnings = [text for text, on in (("dirty tree", report.dirty), ("quick run", report.quick)) if on]
    first = cases[0]
    named = f"{first.what}{', ' + first.about['mode'] if first.mode else ''}"
    figure.suptitle("\n".join([named, ", ".join([report.folder, first.dtype, *warnings])]), fontsize=11)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # the same bytes from the same file
    return buffer.getvalue()


PLOTTED = ("kernels", "train-step", "rollout")


def render(path: Path) -> list[Path]:
    """Write the Markdown file and the plots beside a report."""
    report = records.load(path)
    made = [path.with_suffix(".md")]
    records.write_atomically(made[0], markdown(report, path.name).encode())
    groups: dict[str, list[Case]] = {}
    for case in report.cases if report.benchmark in PLOTTED else ():
        if any(row.seconds for row in case.rows):
            name = "-".join(filter(None, (case.what if case.what != report.benchmark else "", case.mode)))
            groups.setdefault(name, []).append(case)
    for name, cases in groups.items():
        made.append(path.with_name(f"{'-'.join(filter(None, (path.stem, name)))}.png"))
        records.write_atomically(made[-1], plot(report, cases))
    return made


C = TypeVar("C")


def run(
    recorder: records.Recorder,
    cases: Sequence[C],
    measure: Callable[[C, Callable[[str], None]], Case],
    minutes: float | None = None,
) -> None:
    """Measure the cases that begin within the minutes, write the report after each, and render it at the end.

    `measure` gets a case and a function that shows what it does. Raises Refused at the end if a case was refused.
    """
    console, began = Console(width=None if sys.stdout.isatty() else LOG_WIDTH), time.monotonic()
    console.print(recorder.opening(), highlight=False)
    for index, case in enumerate(cases):
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            console.print(f"{len(cases) - index} cases were not begun after {minutes:g} minutes.")
            break
        with console.status("") as status:
            result = measure(case, status.update)
        recorder.put((*recorder.report.cases, result))
        ran = replace(result, rows=tuple(row for row in result.rows if row.reason is None))
        console.print(Markdown("\n\n".join([f"## {result.what}", *parts_of(ran, recorder.report)])))
        for row in result.rows:
            if row.reason is not None:  # in a cell it would be cut
                console.print(f"{row.name}: {row.reason}", markup=False, highlight=False)
    report = recorder.report
    if not report.cases:
        return
    recorder.put(report.cases, complete=len(report.cases) == len(cases))
    console.print(Markdown("\n\n".join(conclusions(report))))
    for made in (recorder.path, *render(recorder.path)):
        click.echo(f"wrote {made}")
    refused = [f"{case.refused} (case {case.name})" for case in recorder.report.cases if case.refused]
    if refused:
        raise cli.Refused(" ".join(refused))


# --- summaries: the tables of READMEs and pages


def kernel_summary(cases: Sequence[Case], source: str) -> str:
    """A line for each size and mode, a column for each candidate: time over ours, and peak memory."""
    rows = [row for case in cases for row in case.rows]
    names = dict.fromkeys(row.name for row in rows if row.role != LIMIT)
    ran = [name for name in names if any(row.seconds for row in rows if row.name == name)]
    bare = any(row.gemms for row in rows)

    def short(row: Row | None, ours: Row) -> str:
        if row is None or not row.seconds:
            return NONE
        return f"{median(records.ratio(row, ours), '.2f')}x, {mebibytes(row.peak_bytes)} MiB"

    lines = []
    for case in cases:
        ours = case.row(OURS)
        assert ours is not None
        limit = case.limit()
        against = [f"{median(records.ratio(limit, ours), '.2f')}x"] if limit else [NONE] if bare else []
        lines.append([case.mode, size(case), *(short(case.row(name), ours) for name in ran), *against])
    absent = {row.name: row.reason for row in rows if row.reason is not None and row.name not in ran}
    missing = f" Not run: {'; '.join(f'{name} ({reason})' for name, reason in absent.items())}." if absent else ""
    made = table(["pass", " x ".join(cases[0].sizes), *ran, *(["bare GEMMs"] if bare else [])], lines)
    return (
        f"{made}\n\nTime relative to {OURS} (smaller is faster) and peak memory above the inputs ({cases[0].dtype}). "
        f"{source.replace(' From `', f'{missing} From `')}"
    )


UNSHARED, TRL = "onecard, prompts not shared", "TRL"


def dpo_summary(report: Report, cases: Sequence[Case], source: str) -> str:
    lines = []
    for case in cases:
        ours, plain, theirs = (case.row(name) for name in (OURS, UNSHARED, TRL))
        if ours is None or not ours.seconds:
            continue
        memory, faster = NONE, NONE
        if theirs is not None:
            faster = theirs.reason or factor(records.ratio(theirs, ours))
            if theirs.peak_bytes and ours.peak_bytes:
                memory = f"{ours.peak_bytes / theirs.peak_bytes:.2f}x"
        shared = factor(records.ratio(plain, ours) if plain else None)
        rate = median(ours.token_rate)
        lines.append([title(case, report), rate, faster, shared, mebibytes(whole_bytes(ours)), memory])
    headings = ("DPO step", "tokens/s", "faster than TRL by", "speed-up from shared prompts alone", "peak, MiB",
                "step's memory / TRL's")  # fmt: skip
    return f"{table(headings, lines)}\n\n{source}"


def ppo_summary(report: Report, cases: Sequence[Case], source: str) -> str:
    lines = []
    for case in cases:
        whole, rollout = case.row(WHOLE), case.row("rollout")
        if whole is not None and whole.seconds and rollout is not None:
            share = median(records.ratio(rollout, whole), ".0%")
            rates = median(rollout.token_rate), share, median(whole.token_rate)
            lines.append([title(case, report), *rates, mebibytes(whole_bytes(whole))])
    headings = ("PPO iteration", "rollout, tokens/s", "rollout's share", "whole, tokens/s", "peak, MiB")
    return f"{table(headings, lines)}\n\n{source}"


def rollout_summary(cases: Sequence[Case], source: str) -> str:
    lines = [
        [case.name, median(case.rows[0].token_rate), median(case.rows[-1].token_rate), factor(rollout_ratio(case))]
        for case in cases
        if case.rows
    ]
    return f"{table(('rollout', 'onecard, tokens/s', 'generate, tokens/s', 'faster by'), lines)}\n\n{source}"


NO_OPTION = "none"  # the row that times of memory options are relative to


def memory_summary(cases: Sequence[Case], source: str) -> str:
    (case,) = cases
    base = case.row(NO_OPTION)
    assert base is not None
    lines = [
        [f"`{row.name}`" if row.name.startswith("--") else row.name, mebibytes(row.held_bytes),
         mebibytes(row.peak_bytes), factor(records.ratio(row, base))]
        for row in case.rows
    ]  # fmt: skip
    headings = ("option", "held between steps, MiB", "peak of a step above that, MiB", "time of a step")
    about = f"{settings(case)[:-1]}, {case.name}. Time over the step without an option, round by round."
    return f"{table(headings, lines)}\n\n{about} {source}"


def scale_summary(cases: Sequence[Case], source: str) -> str:
    lines = [
        [row.name, f"{median(row.time, '.0f')} s", f"{(row.peak_bytes or 0) / 2**30:.2f} GiB"]
        for case in cases
        for row in case.rows
    ]
    made = table(("", "wall time", "peak resident memory"), lines)
    return f"{made}\n\nEach row is one process from its start to its end, imports and all. {source}"


def summaries(report: Report, name: str) -> dict[str, str]:
    """By the name of a marked region."""
    source = f"{provenance(report)} From `{name}`."
    kinds = {what: [case for case in cases if case.rows] for what, cases in report.kinds.items()}
    kinds = {what: cases for what, cases in kinds.items() if cases}
    if report.benchmark == "kernels":
        return {what: kernel_summary(cases, source) for what, cases in kinds.items()}
    made: dict[str, Callable[[Sequence[Case], str], str]] = {
        "train-step-dpo": partial(dpo_summary, report),
        "train-step-ppo": partial(ppo_summary, report),
        "rollout": rollout_summary,
        "memory-options": memory_summary,
        "scale": scale_summary,
    }
    named = {f"train-step-{what}" if report.benchmark == "train-step" else what: cases for what, cases in kinds.items()}
    return {region: made[region](cases, source) for region, cases in named.items() if region in made}


OPENING, CLOSING = "<!-- benchmark:{} -->", "<!-- /benchmark -->"


def updated(text: str, bodies: Mapping[str, str]) -> str:
    """`text` with each body between its marks, and all else as it was. Doing it twice changes nothing.

    Bodies without marks are left out, and regions of other benchmarks left alone; ValueError if there are no marks.
    """
    hits = 0
    for name, body in bodies.items():
        opening = OPENING.format(name)
        pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(CLOSING)}", re.DOTALL)
        found = len(pattern.findall(text))
        if found > 1 or found < text.count(opening):
            raise ValueError(f"expected one block of {opening} ... {CLOSING}, found {found}")
        hits += found
        text = pattern.sub(lambda _, new=f"{opening}\n{body}\n{CLOSING}": new, text)
    if not hits:
        raise ValueError(f"expected one block of {OPENING.format(next(iter(bodies), 'NAME'))} ... {CLOSING}, found 0")
    return text


def update(page: Path, bodies: Mapping[str, str]) -> None:
    """Put bodies between their marks in a page."""
    try:
        text = updated(page.read_text(encoding="utf-8"), bodies)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{page}: {getattr(error, 'strerror', None) or error}") from None
    records.write_atomically(page, text.encode())


@click.command(context_settings=cli.SETTINGS)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--readme",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put the summaries of one FILE between <!-- benchmark:NAME --> and <!-- /benchmark --> in this page.",
)
def command(files: tuple[Path, ...], readme: Path | None) -> None:
    """Make the Markdown and the plots of each FILE, beside it. Numbers come from the file alone.

    \b
    python -m benchmarks.render benchmarks/results/cpu-2-cores/*.json
    python -m benchmarks.render benchmarks/results/cpu-2-cores/RUN.json --readme README.md
    """
    if readme is not None and len(files) > 1:
        raise click.UsageError("--readme takes its numbers from one FILE; give one.")
    try:
        for path in files:
            for made in render(path):
                click.echo(f"wrote {made}")
        if readme is not None:
            whole, parent = files[0].resolve(), readme.resolve().parent
            name = whole.relative_to(parent).as_posix() if whole.is_relative_to(parent) else whole.name
            update(readme, summaries(records.load(whole), name))
            click.echo(f"updated {readme}")
    except ValueError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    sys.exit(cli.main(command))
