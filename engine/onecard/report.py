"""`report.html` of a run folder and of the demo: pictures inside, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.checkpoint import replace_folder, write_text
from onecard.errors import OnecardError
from onecard.plots import Metrics, Panel, curves, grid, png, points
from onecard.runs import CONFIG, METRICS, SAMPLES

REPORT = "report.html"
PLOTS = "plots"


@dataclass(frozen=True)
class Chart:
    """A plot that is drawn when the metrics hold any of its names, with or without `eval_` before them."""

    file: str
    title: str
    names: tuple[str, ...]
    unit: str


# In the order of the report. No chart belongs to a command: the metrics that a run logged decide.
CHARTS = (
    Chart("loss", "Loss", ("loss",), "nats"),
    Chart("accuracy", "Pairs ranked right", ("accuracy", "rewards/accuracies"), "share of pairs"),
    Chart("margin", "Chosen minus rejected", ("margin", "rewards/margins"), "reward"),
    Chart("rewards", "Implicit rewards", ("rewards/chosen", "rewards/rejected"), "reward"),
    Chart("reward_range", "Scores", ("mean_reward", "min_reward", "max_reward"), "reward"),
    Chart("logps", "Log-probability of the answers", ("logps/chosen", "logps/rejected"), "nats per answer"),
    Chart("token_accuracy", "Tokens predicted right", ("mean_token_accuracy",), "share of tokens"),
    Chart("entropy", "Entropy", ("entropy", "policy/entropy_avg"), "nats per token"),
    Chart("score", "Reward of the samples", ("objective/scores", "objective/rlhf_reward"), "reward"),
    Chart("kl", "Distance to the reference", ("objective/kl",), "nats per answer"),
    Chart("approxkl", "Distance of one update", ("policy/approxkl_avg",), "nats per token"),
    Chart("clipfrac", "Tokens clipped", ("policy/clipfrac_avg", "val/clipfrac_avg"), "share of tokens"),
    Chart("explained_variance", "Variance explained by the critic", ("val/explained_variance",), "share"),
    Chart("policy_losses", "Policy and value loss", ("loss/policy_avg", "loss/value_avg"), "loss"),
    Chart("kl_coef", "KL coefficient", ("objective/kl_coef",), "per nat"),
    Chart("length", "Length of the answers", ("completions/mean_length",), "tokens"),
    Chart("cut", "Answers cut at response_length", ("completions/clipped_ratio",), "share of answers"),
    Chart("grad_norm", "Gradient norm before clipping", ("grad_norm",), "norm"),
    Chart("learning_rate", "Learning rate", ("learning_rate",), "per step"),
    Chart("speed", "Speed", ("time/tokens_per_second", "time/rollout_tokens_per_second"), "tokens per second"),
    Chart("memory", "Peak memory so far", ("memory/peak_gib",), "GiB"),
)
NOT_CURVES = {"step", "epoch", "episode"}
# The demo's picture has a column for each stage. Its first and second row: the first of these that the stage logged.
STAGE_ROWS = (("score", "loss"), ("kl", "accuracy", "token_accuracy", "margin", "speed"))
# A third row for what has to be watched where answers are sampled.
ROLLOUT_CHARTS = ("clipfrac", "entropy", "explained_variance", "length")


@dataclass(frozen=True)
class Stage:
    """One run of the demo: `Stage("DPO", "runs/demo/dpo")`."""

    name: str
    run_dir: Path | str


@dataclass(frozen=True)
class TableRow:
    """One line of the headline table; `value` is shown as it is given."""

    stage: str
    metric: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Side:
    """One answer: whose it is, its text, and its reward where something gave one."""

    name: str
    text: str
    reward: float | None = None


@dataclass(frozen=True)
class Sample:
    """Answers to one prompt side by side, from before the training to after it."""

    prompt: str
    sides: tuple[Side, ...]


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. A last line that was cut off in the middle is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise OnecardError(f"No metrics at {path}. The run has not logged a step yet.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif number < len(lines):
            raise OnecardError(f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}.")
    if not rows:
        raise OnecardError(f"{path} has no rows. The run has not logged a step yet.")
    return rows


def read_samples(path: Path) -> list[Sample]:
    """The first and the last answers of a run to the same prompts, from its `samples.jsonl` if it has one."""
    rows = read_metrics(path) if path.exists() and path.stat().st_size else []
    if not rows or rows[0]["step"] == rows[-1]["step"]:
        return []
    before, after = ([row for row in rows if row["step"] == rows[end]["step"]] for end in (0, -1))
    return [
        Sample(
            old["prompt"],
            (Side("before", old["completion"], old["score"]), Side("after", new["completion"], new["score"])),
        )
        for old, new in zip(before, after, strict=False)
    ]


def write_run_report(run_dir: Path | str, samples: Sequence[Sample] = ()) -> Path:
    """Write `plots/*.png` and `report.html` of one run; returns the path of the report."""
    folder = Path(run_dir)
    samples = samples or read_samples(folder / SAMPLES)
    metrics = read_metrics(folder / METRICS)
    known = {chart.file: _picture(metrics, chart) for chart in _drawn(metrics)}
    other = {chart.file: _picture(metrics, chart) for chart in _unknown(metrics)}
    sections = [("Curves", _images(known)), ("Other metrics", _images(other))]
    _write_plots(folder, {**known, **other})
    return _write_page(
        folder,
        title=f"Run {folder.resolve().name}",
        lead=f"{int(metrics[-1]['step'])} steps. Lines are training rows, dashes held-out rows.",
        sections=[section for section in sections if section[1]],
        samples=samples,
        configs=_configs([Stage(folder.resolve().name, folder)]),
    )


def write_demo_report(
    folder: Path | str, stages: Sequence[Stage], table: Sequence[TableRow], samples: Sequence[Sample]
) -> Path:
    """Write `plots/*.png` and `report.html` of the demo; returns the path of the report."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    runs = [(stage.name, read_metrics(Path(stage.run_dir) / METRICS)) for stage in stages]
    overview = {"curves": png(grid(_overview(runs)))}
    plots = dict(overview)
    sections = [("All stages", _images(overview))]
    for name, metrics in runs:
        drawn = {f"{_slug(name)}-{chart.file}": _picture(metrics, chart) for chart in _drawn(metrics)}
        plots |= drawn
        sections.append((f"{name}: all curves", _images(drawn)))
    _write_plots(place, plots)
    return _write_page(
        place,
        title="onecard demo",
        lead=f"A tiny language model, trained from its first step: {', then '.join(stage.name for stage in stages)}.",
        table=table,
        sections=sections[:1],
        samples=samples,
        folded=sections[1:],
        configs=_configs(stages),
    )


def _has(metrics: Metrics, name: str) -> bool:
    return bool(points(metrics, name)[0] or points(metrics, f"eval_{name}")[0])


def _drawn(metrics: Metrics) -> list[Chart]:
    """The known charts that these metrics have curves for, each with those curves only."""
    present = [(chart, tuple(name for name in chart.names if _has(metrics, name))) for chart in CHARTS]
    return [Chart(chart.file, chart.title, names, chart.unit) for chart, names in present if names]


def _unknown(metrics: Metrics) -> list[Chart]:
    """A chart for every metric that no known chart names."""
    known = {name for chart in CHARTS for name in chart.names} | NOT_CURVES
    names = dict.fromkeys(key.removeprefix("eval_") for row in metrics for key in row)
    return [
        Chart(f"other-{i}-{_slug(name)}", name, (name,), "")
        for i, name in enumerate(name for name in names if name not in known and _has(metrics, name))
    ]


def _overview(runs: Sequence[tuple[str, Metrics]]) -> list[list[Panel]]:
    """Two rows of panels, one column for each stage: its loss or score, and what it is trained for; then PPO's own."""
    rows: list[list[Panel]] = [[], [], []]
    for name, metrics in runs:
        charts = {chart.file: chart for chart in _drawn(metrics)}
        chosen = [next((file for file in files if file in charts), None) for files in STAGE_ROWS]
        more = ROLLOUT_CHARTS if chosen[0] == "score" else ()
        for row, file in [*zip(rows, chosen, strict=False), *((rows[2], file) for file in more)]:
            if file in charts:
                chart = charts[file]
                row.append(Panel(metrics, chart.names, f"{name}: {chart.title.lower()}", chart.unit))
    return [row for row in rows if row]


def _picture(metrics: Metrics, chart: Chart) -> bytes:
    return png(curves(metrics, chart.names, chart.title, chart.unit))


def _slug(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())


def _images(pictures: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Name and data URI of each picture."""
    return [(name, f"data:image/png;base64,{base64.b64encode(data).decode()}") for name, data in pictures.items()]


def _configs(stages: Sequence[Stage]) -> list[tuple[str, str]]:
    paths = [(stage.name, Path(stage.run_dir) / CONFIG) for stage in stages]
    return [(name, path.read_text(encoding="utf-8")) for name, path in paths if path.exists()]


def _write_plots(folder: Path, plots: Mapping[str, bytes]) -> None:
    def write(temporary: Path) -> None:
        for name, data in plots.items():
            (temporary / f"{name}.png").write_bytes(data)

    replace_folder(folder / PLOTS, write)


def _reward(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}" if math.isfinite(value) else str(value)


def _sides(samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        sides = [(side.name, side.text.strip(), _reward(side.reward)) for side in sample.sides]
        yield {"prompt": sample.prompt.strip(), "sides": sides}


def _write_page(folder: Path, samples: Sequence[Sample] = (), **content: Any) -> Path:
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(PAGE).render({"table": (), "folded": (), **content, "samples": list(_sides(samples))})
    write_text(folder / REPORT, html)
    return folder / REPORT


# Colours come from the reader's light or dark mode; the plots keep a white card of their own in both.
STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#212529, #e9ecef); --soft: light-dark(#5c636a, #adb5bd);
  --line: light-dark(#dee2e6, #3b4046); --page: light-dark(#ffffff, #16181b); --card: light-dark(#f8f9fa, #1f2226);
  --good: light-dark(#2b8a3e, #69db7c); --accent: light-dark(#1d4ed8, #91a7ff); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.02em; }
h2 { margin: 2.5rem 0 0.9rem; font-size: 1.2rem; }
.lead { margin: 0.3rem 0 0; color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-size: 0.95rem; }
th { color: var(--soft); font-weight: 500; font-size: 0.82rem; }
th, td { padding: 0.5rem 0.9rem 0.5rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.value { font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--accent); }
td.meaning { color: var(--soft); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.plots.one { grid-template-columns: 1fr; }
img { display: block; width: 100%; max-width: 46rem; padding: 0.6rem; background: #fff;
  border: 1px solid var(--line); border-radius: 10px; }
.one img { max-width: none; }
.sample { margin-bottom: 1rem; padding: 0.9rem 1.1rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.prompt { margin: 0 0 0.6rem; font-weight: 600; overflow-wrap: anywhere; }
.sides { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.sides p { margin: 0.15rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.side { color: var(--soft); font-size: 0.82rem; }
.side b { margin-left: 0.4rem; color: var(--ink); font-variant-numeric: tabular-nums; }
.after .side b { color: var(--good); }
details { margin-top: 0.8rem; } summary { cursor: pointer; color: var(--soft); }
details > div, pre { margin-top: 0.7rem; }
pre { padding: 1rem; overflow-x: auto; font-size: 0.82rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>"""
    + STYLE
    + """</style></head>
<body>
{% macro gallery(images) %}
<div class="plots{{ " one" if images[0][0] == "curves" }}">
{% for name, uri in images %}<img alt="{{ name }}" src="{{ uri }}">
{% endfor %}</div>
{% endmacro %}
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% if table %}
<h2>Results</h2>
<table><thead><tr><th>stage</th><th>metric</th><th>value</th><th>meaning</th></tr></thead><tbody>
{% for row in table %}
<tr><td>{{ row.stage }}</td><td>{{ row.metric }}</td><td class="value">{{ row.value }}</td>
<td class="meaning">{{ row.meaning }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}
{% for heading, images in sections %}
<h2>{{ heading }}</h2>
{{ gallery(images) }}
{% endfor %}
{% if samples %}
<h2>Answers before and after</h2>
{% for sample in samples %}
<div class="sample"><p class="prompt">{{ sample.prompt }}</p><div class="sides">
{% for name, text, reward in sample.sides %}
<div{% if loop.last %} class="after"{% endif %}>
<span class="side">{{ name }}{% if reward %} <b>{{ reward }}</b>{% endif %}</span>
<p>{{ text }}</p></div>
{% endfor %}
</div></div>
{% endfor %}
{% endif %}
{% if folded or configs %}
<h2>Details</h2>
{% for heading, images in folded %}
<details><summary>{{ heading }}</summary><div>{{ gallery(images) }}</div></details>
{% endfor %}
{% for name, text in configs %}
<details><summary>{{ name }}: config.yaml</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% endif %}
</body>
</html>
"""
)
