"""The library's targets: each is a figure of a case's rows and a bar. Targets of a GPU are for an H200."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import EAGER
from benchmarks.records import OURS, Case, Report, ratio
from benchmarks.shapes import GPT2, MAIN, batch, of_model

Figure = Callable[[Case], float | None]  # None: not measured


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

    def cells(self, case: Case | None) -> list[str]:
        """What, the bar, the figure, the verdict."""
        figure = None if case is None else self.figure(case)
        bound = f"{'at least' if self.at_least else 'at most'} {self.form.format(self.bar)}"
        if figure is None:
            return [self.what, bound, "not measured", "–"]
        met = figure >= self.bar if self.at_least else figure <= self.bar
        return [self.what, bound, self.form.format(figure), "met" if met else "missed"]


def over(first: str, second: str) -> Figure:
    """One candidate's time over another's, the median of the rounds' ratios. "GEMMs": the bare ones."""

    def figure(case: Case) -> float | None:
        one, other = (case.limit() if name == GEMMS else case.row(name) for name in (first, second))
        times = ratio(one, other) if one and other else None
        return times and times.median

    return figure


def value(field: str, name: str = OURS) -> Figure:
    """A field of a candidate's row."""
    return lambda case: getattr(case.row(name), field, None)


def error(result: str) -> Figure:
    return lambda case: row.errors.get(result) if (row := case.row(OURS)) else None


def peak(name: str, minus: int = 0, unit: float = 1e6) -> Figure:
    """Peak memory above the inputs and above `minus` bytes of results, in units of so many bytes."""

    def figure(case: Case) -> float | None:
        row = case.row(name)
        return None if row is None or row.peak_bytes is None else (row.peak_bytes - minus) / unit

    return figure


GEMMS, LOW = "GEMMs", f"{OURS}, low memory"
PERCENT, NATS, MEGABYTES, COUNT = "{:.0%}", "{:.1e} nat", "{:.0f} MB", "{:.0f}"
H200 = of_model(MAIN, 8192)
D_HIDDEN = H200["N"] * H200["D"] * 2  # bytes, bf16
GPU_BATCH, CPU_BATCH = batch(64, 4096), batch(64, 1024)
LOSSES = {"linear_logprobs": "any loss of log-probabilities", "linear_ppo_loss": "PPO's loss"}
BOTH_WAYS = "forward + backward"
LOGITS = GPT2["N"] * GPT2["V"] * 4  # bytes, fp32

TARGETS = (
    Target("cuda", "linear_logprobs", "forward", H200.name, "log-probabilities, forward: share of the GEMM rate",
           value("of_limit"), 0.90, PERCENT, at_least=True),
    Target("cuda", "linear_logprobs", "forward", H200.name, "the same: error", error("logp"), 1e-4, NATS),
    Target("cuda", "linear_logprobs", "frozen", H200.name, f"low memory, {BOTH_WAYS}: peak beyond dHidden",
           peak(LOW, D_HIDDEN), 100, MEGABYTES),
    Target("cuda", "linear_logprobs", "frozen", H200.name, f"low memory, {BOTH_WAYS}: time over the fast mode's",
           over(LOW, OURS), 1.3),
    Target("cuda", "selective_log_softmax", "forward", "qwen2.5-0.5b-logits-8k",
           "log-probabilities and entropy from logits: share of the copy bandwidth", value("of_limit"), 0.92, PERCENT,
           at_least=True),
    *(
        target
        for name, what in LOSSES.items()
        for target in (
            # 2.2u at the measured rate; two bare products are 2u
            Target("cuda", name, "frozen", H200.name, f"{what}, {BOTH_WAYS}: time over bare 2u",
                   over(OURS, GEMMS), 1.1),
            Target("cuda", name, "frozen", H200.name, f"{what}, {BOTH_WAYS}: peak beyond dHidden",
                   peak(OURS, D_HIDDEN), 1000, MEGABYTES),
        )
    ),
    # A launch each way, or two where a global sum is needed, as the loss's is
    *(
        Target("cuda", name, mode, GPU_BATCH.name, f"{name}, {what}: launches", value("launches"), most, COUNT)
        for name in ("ppo_loss", "value_loss")
        for mode, what, most in (("forward", "forward", 2), ("backward", BOTH_WAYS, 4))
    ),
    *(
        Target(device, "gae", "forward", shape.name, f"gae at {shape}: times faster than the Python loop",
               over(EAGER, OURS), 20, "{:.0f}x", at_least=True)
        for device, shape in (("cuda", GPU_BATCH), ("cpu", CPU_BATCH))
    ),
    Target("cuda", "gae", "forward", GPU_BATCH.name, "gae: launches", value("launches"), 2, COUNT),
    *(
        target
        for (name, what), trl in zip(LOSSES.items(), ("TRL", "TRL + formula"), strict=True)
        for target in (
            Target("cpu", name, "frozen", GPT2.name, f"{what}, {BOTH_WAYS}: time over TRL's", over(OURS, trl), 0.45),
            Target("cpu", name, "frozen", GPT2.name, f"{what}, {BOTH_WAYS}: time over eager's",
                   over(OURS, EAGER), 0.75),
            Target("cpu", name, "frozen", GPT2.name, f"{what}, {BOTH_WAYS}: peak over the logits' size",
                   peak(OURS, unit=LOGITS), 0.15, "{:.1%}"),
        )
    ),
)  # fmt: skip


def verdicts(report: Report) -> list[list[str]]:
    """Of the operations in a report of the usual shapes: the lines of a table."""
    if report.quick or report.benchmark != "kernels":
        return []
    cases = {case.key: case for case in report.cases}
    return [
        target.cells(cases.get((target.benchmark, target.shape, target.mode)))
        for name in report.kinds
        for target in TARGETS
        if (target.device, target.benchmark) == (report.device, name)
    ]
