"""The charts of a report, in their order. A chart is drawn if the run logged any of its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onecard.reporting.plots import Metrics, Panel, curves, png, points


@dataclass(frozen=True)
class Chart:
    """A plot of the metrics `names` and of their `eval_` variants. `file`: name of the PNG, without `.png`."""

    file: str
    title: str
    names: tuple[str, ...]
    unit: str


CHARTS = (
    Chart("loss", "Loss", ("loss",), "nats"),
    Chart("accuracy", "Pairs ranked correctly", ("accuracy", "rewards/accuracies"), "share of pairs"),
    Chart("margin", "Chosen minus rejected", ("margin", "rewards/margins"), "reward"),
    Chart("rewards", "Implicit rewards", ("rewards/chosen", "rewards/rejected"), "reward"),
    Chart("reward_range", "Scores", ("mean_reward", "min_reward", "max_reward"), "reward"),
    Chart("correlation", "Correlation with the given scores", ("pearson", "spearman"), "correlation"),
    Chart("logps", "Log-probability of the answers", ("logps/chosen", "logps/rejected"), "nats per answer"),
    Chart("token_accuracy", "Tokens predicted correctly", ("mean_token_accuracy",), "share of tokens"),
    Chart("entropy", "Entropy", ("entropy", "policy/entropy_avg"), "nats per token"),
    Chart("score", "Reward of the samples", ("objective/scores", "objective/rlhf_reward"), "reward"),
    Chart("kl", "KL to the reference", ("objective/kl",), "nats per answer"),
    Chart("approxkl", "KL of one update", ("policy/approxkl_avg",), "nats per token"),
    Chart("clipfrac", "Tokens clipped", ("policy/clipfrac_avg", "val/clipfrac_avg"), "share of tokens"),
    Chart("explained_variance", "Variance explained by the critic", ("val/explained_variance",), "share"),
    Chart("violations", "Answers that violate the constraint", ("constraint/violation_rate",), "share of answers"),
    Chart("cost", "Cost of the answers", ("constraint/cost", "constraint/lambda"), "cost"),
    Chart("policy_losses", "Policy and value loss", ("loss/policy_avg", "loss/value_avg"), "loss"),
    Chart("kl_coef", "KL coefficient", ("objective/kl_coef",), "per nat"),
    Chart("length", "Length of the answers", ("completions/mean_length",), "tokens"),
    Chart("cut", "Answers cut at response_length", ("completions/clipped_ratio",), "share of answers"),
    Chart("grad_norm", "Gradient norm before clipping", ("grad_norm",), "norm"),
    Chart("learning_rate", "Learning rate", ("learning_rate",), "per step"),
    Chart("speed", "Speed", ("time/tokens_per_second", "time/rollout_tokens_per_second"), "tokens per second"),
    Chart("memory", "Memory", ("memory/peak_gib", "memory/rollout_gib", "memory/learn_gib"), "GiB"),
)
NOT_CURVES = {"step", "epoch", "episode"}
# Rows one and two of the demo's overview, which has a column per stage: the first of these charts that the stage has
STAGE_ROWS = (("score", "loss"), ("kl", "accuracy", "token_accuracy", "margin", "speed"))
# The charts of row three, for stages that sample responses
ROLLOUT_CHARTS = ("clipfrac", "entropy", "explained_variance", "length")


def _has(metrics: Metrics, name: str) -> bool:
    return bool(points(metrics, name)[0] or points(metrics, f"eval_{name}")[0])


def known_charts(metrics: Metrics) -> list[Chart]:
    """The charts in `CHARTS` with at least one metric that was logged; metrics that were not logged are left out."""
    present = [(chart, tuple(name for name in chart.names if _has(metrics, name))) for chart in CHARTS]
    return [Chart(chart.file, chart.title, names, chart.unit) for chart, names in present if names]


def other_charts(metrics: Metrics) -> list[Chart]:
    """One chart for each logged metric that is not in `CHARTS`."""
    known = {name for chart in CHARTS for name in chart.names} | NOT_CURVES
    names = dict.fromkeys(key.removeprefix("eval_") for row in metrics for key in row)
    return [
        Chart(f"other-{i}-{slug(name)}", name, (name,), "")
        for i, name in enumerate(name for name in names if name not in known and _has(metrics, name))
    ]


def overview(runs: Sequence[tuple[str, Metrics]]) -> list[list[Panel]]:
    """The panels of the demo's overview, row by row; a stage is a column in rows one and two."""
    rows: list[list[Panel]] = [[], [], []]
    for name, metrics in runs:
        charts = {chart.file: chart for chart in known_charts(metrics)}
        chosen = [next((file for file in files if file in charts), None) for files in STAGE_ROWS]
        more = ROLLOUT_CHARTS if chosen[0] == "score" else ()
        for row, file in [*zip(rows, chosen, strict=False), *((rows[2], file) for file in more)]:
            if file in charts:
                chart = charts[file]
                row.append(Panel(metrics, chart.names, f"{name}: {chart.title}", chart.unit))
    return [row for row in rows if row]


def chart_png(metrics: Metrics, chart: Chart) -> bytes:
    """A chart as PNG."""
    return png(curves(metrics, chart.names, chart.title, chart.unit))


def slug(name: str) -> str:
    """A metric's name as part of a file name: ASCII letters, digits and hyphens, at most 60 characters."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())[:60]
