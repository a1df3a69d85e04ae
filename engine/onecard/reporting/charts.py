"""Which curves a report draws, in which order. No chart belongs to a command: the metrics that a run logged decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onecard.reporting.plots import Metrics, Panel, curves, png, points


@dataclass(frozen=True)
class Chart:
    """A plot that is drawn when the metrics hold any of its names, with or without `eval_` before them."""

    file: str
    title: str
    names: tuple[str, ...]
    unit: str


CHARTS = (
    Chart("loss", "Loss", ("loss",), "nats"),
    Chart("accuracy", "Pairs ranked right", ("accuracy", "rewards/accuracies"), "share of pairs"),
    Chart("margin", "Chosen minus rejected", ("margin", "rewards/margins"), "reward"),
    Chart("rewards", "Implicit rewards", ("rewards/chosen", "rewards/rejected"), "reward"),
    Chart("reward_range", "Scores", ("mean_reward", "min_reward", "max_reward"), "reward"),
    Chart("correlation", "Correlation with the given scores", ("pearson", "spearman"), "correlation"),
    Chart("logps", "Log-probability of the answers", ("logps/chosen", "logps/rejected"), "nats per answer"),
    Chart("token_accuracy", "Tokens predicted right", ("mean_token_accuracy",), "share of tokens"),
    Chart("entropy", "Entropy", ("entropy", "policy/entropy_avg"), "nats per token"),
    Chart("score", "Reward of the samples", ("objective/scores", "objective/rlhf_reward"), "reward"),
    Chart("kl", "Distance to the reference", ("objective/kl",), "nats per answer"),
    Chart("approxkl", "Distance of one update", ("policy/approxkl_avg",), "nats per token"),
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
# The demo's picture has a column for each stage. Its first and second row: the first of these that the stage logged.
STAGE_ROWS = (("score", "loss"), ("kl", "accuracy", "token_accuracy", "margin", "speed"))
# A third row for what has to be watched where answers are sampled.
ROLLOUT_CHARTS = ("clipfrac", "entropy", "explained_variance", "length")


def _has(metrics: Metrics, name: str) -> bool:
    return bool(points(metrics, name)[0] or points(metrics, f"eval_{name}")[0])


def drawn(metrics: Metrics) -> list[Chart]:
    """The known charts that these metrics have curves for, each with those curves only."""
    present = [(chart, tuple(name for name in chart.names if _has(metrics, name))) for chart in CHARTS]
    return [Chart(chart.file, chart.title, names, chart.unit) for chart, names in present if names]


def unknown(metrics: Metrics) -> list[Chart]:
    """A chart for every metric that no known chart names."""
    known = {name for chart in CHARTS for name in chart.names} | NOT_CURVES
    names = dict.fromkeys(key.removeprefix("eval_") for row in metrics for key in row)
    return [
        Chart(f"other-{i}-{slug(name)}", name, (name,), "")
        for i, name in enumerate(name for name in names if name not in known and _has(metrics, name))
    ]


def overview(runs: Sequence[tuple[str, Metrics]]) -> list[list[Panel]]:
    """Two rows of panels, one column for each stage: its loss or score, and what it is trained for; then PPO's own."""
    rows: list[list[Panel]] = [[], [], []]
    for name, metrics in runs:
        charts = {chart.file: chart for chart in drawn(metrics)}
        chosen = [next((file for file in files if file in charts), None) for files in STAGE_ROWS]
        more = ROLLOUT_CHARTS if chosen[0] == "score" else ()
        for row, file in [*zip(rows, chosen, strict=False), *((rows[2], file) for file in more)]:
            if file in charts:
                chart = charts[file]
                row.append(Panel(metrics, chart.names, f"{name}: {chart.title.lower()}", chart.unit))
    return [row for row in rows if row]


def picture(metrics: Metrics, chart: Chart) -> bytes:
    return png(curves(metrics, chart.names, chart.title, chart.unit))


def slug(name: str) -> str:
    """A metric's name as a part of a file's name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())[:60]
