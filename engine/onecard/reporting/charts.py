"""The charts of a report and their order. A chart is drawn if the run logged its metrics, whatever the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onecard.reporting.plots import Metrics, Panel, curves, png, points


@dataclass(frozen=True)
class Chart:
    """A plot of the metrics `names` and `eval_<name>`. It is drawn if a run logged any of them."""

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
# The demo's overview has a column for each stage. First and second row: the first of these charts that the stage has.
STAGE_ROWS = (("score", "loss"), ("kl", "accuracy", "token_accuracy", "margin", "speed"))
# Third row, for stages that sample responses
ROLLOUT_CHARTS = ("clipfrac", "entropy", "explained_variance", "length")


def _has(metrics: Metrics, name: str) -> bool:
    return bool(points(metrics, name)[0] or points(metrics, f"eval_{name}")[0])


def drawn(metrics: Metrics) -> list[Chart]:
    """The charts in `CHARTS` that these metrics have curves for, reduced to these curves."""
    present = [(chart, tuple(name for name in chart.names if _has(metrics, name))) for chart in CHARTS]
    return [Chart(chart.file, chart.title, names, chart.unit) for chart, names in present if names]


def unknown(metrics: Metrics) -> list[Chart]:
    """A chart for every metric that is in no chart of `CHARTS`."""
    known = {name for chart in CHARTS for name in chart.names} | NOT_CURVES
    names = dict.fromkeys(key.removeprefix("eval_") for row in metrics for key in row)
    return [
        Chart(f"other-{i}-{slug(name)}", name, (name,), "")
        for i, name in enumerate(name for name in names if name not in known and _has(metrics, name))
    ]


def overview(runs: Sequence[tuple[str, Metrics]]) -> list[list[Panel]]:
    """The demo's rows of panels, with a column for each stage: loss or score, main metric, and the rollout's charts."""
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
    """A chart as PNG."""
    return png(curves(metrics, chart.names, chart.title, chart.unit))


def slug(name: str) -> str:
    """A metric's name as part of a file name: ASCII letters, digits and hyphens, at most 60 characters."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())[:60]
