"""The figures that this library set itself, each computed from a run's rows: met or missed, with the figure.

Rows of a table, like the benchmarks: what is measured, where, and the bar. The targets of a GPU were set for an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import tables
from benchmarks.anatomy import EAGER, OURS
from benchmarks.records import Report, Row
from benchmarks.shapes import GPT2, MAIN, Shape, batch, of_model

Rows = Mapping[str, Row]  # of one case, by candidate
Figure = Callable[[Rows], float | None]  # None: not measured


@dataclass(frozen=True)
class Target:
    device: str
    benchmark: str
    mode: str
    shape: str
    what: str
    figure: Figure
    bar: float
    form: str = "{:.2f}x"
    at_least: bool = False  # or at most


@dataclass(frozen=True)
class Verdict:
    target: Target
    figure: float | None

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure >= self.target.bar if self.target.at_least else self.figure <= self.target.bar

    @property
    def cells(self) -> list[str]:
        bound = "at least" if self.target.at_least else "at most"
        figure = "not measured" if self.figure is None else self.target.form.format(self.figure)
        said = {None: tables.NONE, True: "met", False: "missed"}[self.met]
        return [self.target.what, f"{bound} {self.target.form.format(self.target.bar)}", figure, said]


HEADINGS = ("target", "bar", "figure", "")


def over(first: str, second: str) -> Figure:
    """One candidate's time over another's, the median of the rounds' ratios. "GEMMs": the bare ones."""

    def figure(rows: Rows) -> float | None:
        one, other = found(rows, first), found(rows, second)
        ratio = None if one is None or other is None else tables.ratio(one, other)
        return None if ratio is None else ratio.median

    return figure


def found(rows: Rows, name: str) -> Row | None:
    return next((r for r in rows.values() if r.gemms), None) if name == GEMMS else rows.get(name)


def of_limit(name: str) -> Figure:
    return lambda rows: rows[name].of_limit if name in rows else None


def peak(name: str, minus: int = 0, unit: float = 1e6) -> Figure:
    """Peak memory above the inputs and above `minus` bytes of results, in units of so many bytes."""

    def figure(rows: Rows) -> float | None:
        row = rows.get(name)
        return None if row is None or row.peak_bytes is None else (row.peak_bytes - minus) / unit

    return figure


def launches(rows: Rows) -> float | None:
    return rows[OURS].launches if OURS in rows else None


def error(result: str) -> Figure:
    return lambda rows: rows[OURS].errors.get(result) if OURS in rows else None


GEMMS = "GEMMs"
LOW = f"{OURS}, low memory"
PERCENT, NATS, MEGABYTES, COUNT = "{:.0%}", "{:.1e} nat", "{:.0f} MB", "{:.0f}"
H200 = of_model(MAIN, 8192)
D_HIDDEN = H200["N"] * H200["D"] * 2  # bytes, bf16


def gpu_targets() -> list[Target]:
    where = H200.name
    found = [
        Target("cuda", "linear_logprobs", "forward", where, "log-probabilities, forward: share of the GEMM rate",
               of_limit(OURS), 0.90, PERCENT, at_least=True),
        Target("cuda", "linear_logprobs", "forward", where, "the same: error", error("logp"), 1e-4, NATS),
        Target("cuda", "linear_logprobs", "frozen", where, "low memory, forward + backward: peak beyond dHidden",
               peak(LOW, D_HIDDEN), 100, MEGABYTES),
        Target("cuda", "linear_logprobs", "frozen", where, "low memory, forward + backward: time over the fast mode's",
               over(LOW, OURS), 1.3),
        Target("cuda", "selective_log_softmax", "forward", "qwen2.5-0.5b-logits-8k",
               "log-probabilities and entropy from logits: share of the copy bandwidth", of_limit(OURS), 0.92, PERCENT,
               at_least=True),
    ]  # fmt: skip
    for benchmark, what in (("linear_logprobs", "any loss of log-probabilities"), ("linear_ppo_loss", "PPO's loss")):
        name = f"{what}, forward + backward: "
        found += [
            # 2.2u at the measured rate; two bare products are 2u
            Target("cuda", benchmark, "frozen", where, f"{name}time over bare 2u", over(OURS, GEMMS), 1.1),
            Target("cuda", benchmark, "frozen", where, f"{name}peak beyond dHidden", peak(OURS, D_HIDDEN), 1000,
                   MEGABYTES),
        ]  # fmt: skip
    for benchmark in ("ppo_loss", "value_loss"):
        shape = batch(64, 4096).name
        # A launch each way, or two where a global sum is needed, as the loss's is
        found += [
            Target("cuda", benchmark, "forward", shape, f"{benchmark}, forward: launches", launches, 2, COUNT),
            Target("cuda", benchmark, "backward", shape, f"{benchmark}, forward + backward: launches", launches, 4,
                   COUNT),
        ]  # fmt: skip
    found += gae_targets("cuda", batch(64, 4096))
    return [*found, Target("cuda", "gae", "forward", batch(64, 4096).name, "gae: launches", launches, 2, COUNT)]


def gae_targets(device: str, shape: Shape) -> list[Target]:
    what = f"gae at {shape}: times faster than the Python loop"
    return [Target(device, "gae", "forward", shape.name, what, over(EAGER, OURS), 20, "{:.0f}x", at_least=True)]


def cpu_targets() -> list[Target]:
    logits = GPT2["N"] * GPT2["V"] * 4  # bytes, fp32
    found = []
    for benchmark, what, trl in (
        ("linear_logprobs", "any loss of log-probabilities", "TRL"),
        ("linear_ppo_loss", "PPO's loss", "TRL + formula"),
    ):
        name = f"{what}, forward + backward: "
        found += [
            Target("cpu", benchmark, "frozen", GPT2.name, f"{name}time over TRL's", over(OURS, trl), 0.45),
            Target("cpu", benchmark, "frozen", GPT2.name, f"{name}time over eager's", over(OURS, EAGER), 0.75),
            Target("cpu", benchmark, "frozen", GPT2.name, f"{name}peak over the logits' size",
                   peak(OURS, unit=logits), 0.15, "{:.1%}"),
        ]  # fmt: skip
    return found + gae_targets("cpu", batch(64, 1024))


TARGETS: tuple[Target, ...] = (*gpu_targets(), *cpu_targets())


def verdicts(report: Report) -> list[Verdict]:
    """Of the benchmarks in a report. A quick run has other shapes, and none."""
    if report.quick:
        return []
    judged = []
    for result in report.results:
        cases = tables.cases(result.rows)
        for target in TARGETS:
            if (target.device, target.benchmark) == (report.device, result.benchmark):
                rows = {row.candidate: row for row in cases.get((target.shape, target.mode), [])}
                judged.append(Verdict(target, target.figure(rows)))
    return judged


def heading(report: Report) -> str:
    return f"Targets set for an H200, on {report.machine}" if report.device == "cuda" else "Targets on CPU"
