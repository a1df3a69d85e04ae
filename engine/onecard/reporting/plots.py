"""Curves of a run as matplotlib figures. matplotlib is imported with the first figure and opens no window.

The metrics `name` of training and `eval_name` of evaluation share their axes. Training is a smoothed solid line over
the faint raw values; evaluation is a dashed line with markers.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from onecard.utils.errors import escape_controls

Metrics = Sequence[Mapping[str, Any]]
Points = tuple[list[float], list[float]]

COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d")
INK, FAINT = "#343a40", "#dee2e6"
POINTS = 2000  # about the largest number of points in a curve: more than a plot has pixels
MAX_LABEL = 60  # characters
SMOOTHING = 25  # the moving average spans 1 / SMOOTHING of the curve


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the curves of `names` in `metrics`. `unit` labels the y axis."""

    metrics: Metrics
    names: tuple[str, ...]
    title: str
    unit: str = ""


def points(metrics: Metrics, name: str) -> Points:
    """Steps and values of the rows with a finite number under `name`."""
    pairs = [(row["step"], row[name]) for row in metrics if _is_number(row.get(name)) and _is_number(row.get("step"))]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def smooth(values: Sequence[float]) -> list[float]:
    """A centred moving average. Near the ends, its window has fewer values."""
    radius = max(1, len(values) // (2 * SMOOTHING))
    sums = [0.0, *accumulate(values)]
    ends = ((max(0, i - radius), min(len(values), i + radius + 1)) for i in range(len(values)))
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]


def thinned(steps: Sequence[float], values: Sequence[float]) -> Points:
    """Reduce a curve to about `POINTS` points: the minimum and the maximum of each segment, so that spikes remain."""
    length = max(1, 2 * len(values) // POINTS)
    if length <= 2:
        return list(steps), list(values)
    indices: list[int] = []
    for first in range(0, len(values), length):
        segment = range(first, min(first + length, len(values)))
        indices += sorted({min(segment, key=values.__getitem__), max(segment, key=values.__getitem__)})
    return [steps[index] for index in indices], [values[index] for index in indices]


def label(name: str) -> str:
    """A metric's name as a matplotlib label: `$` and control characters escaped, at most `MAX_LABEL` characters."""
    escaped = escape_controls(name, keep="").replace("$", r"\$")
    return escaped if len(escaped) <= MAX_LABEL else f"{escaped[: MAX_LABEL - 3]}..."


def curves(metrics: Metrics, names: Sequence[str], title: str, unit: str = "") -> Any:
    """One figure with the training and held-out curves of `names`."""
    return grid([[Panel(metrics, tuple(names), title, unit)]])


def grid(rows: Sequence[Sequence[Panel]]) -> Any:
    """One figure with several panels, row by row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = max(len(row) for row in rows)
    single = len(rows) == columns == 1
    size = (7.2, 3.6) if single else (4.6 * columns, 3.1 * len(rows))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08), facecolor="white")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j in range(columns):
            if j < len(row):
                _draw(axes[i][j], row[j])
            else:
                axes[i][j].set_visible(False)
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG without date and version, so that the same curves give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a character without a glyph is drawn as a box
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _labels(panel: Panel) -> Iterator[tuple[str, str, str]]:
    """For each metric of a panel: its name, the label of its training curve, and that of its evaluation curve."""
    if len(panel.names) == 1:
        yield panel.names[0], "training", "held out"
        return
    shorts = [name.rsplit("/", 1)[-1] for name in panel.names]
    for name, last in zip(panel.names, shorts, strict=True):
        short = (last if shorts.count(last) == 1 else name).replace("_", " ")
        yield name, label(short), label(f"{short}, held out")


def _draw(axes: Any, panel: Panel) -> None:
    for colour, (name, train_label, eval_label) in zip(COLOURS * len(panel.names), _labels(panel), strict=False):
        steps, values = points(panel.metrics, name)
        if len(steps) == 1:
            axes.plot(steps, values, color=colour, linestyle="none", marker="o", markersize=4, label=train_label)
        elif steps:
            axes.plot(*thinned(steps, values), color=colour, alpha=0.22, linewidth=0.9)
            axes.plot(*thinned(steps, smooth(values)), color=colour, linewidth=1.8, label=train_label)
        steps, values = points(panel.metrics, f"eval_{name}")
        if steps:
            held_out = COLOURS[1] if len(panel.names) == 1 else colour
            style = {"linestyle": "--", "linewidth": 1.3, "marker": "o", "markersize": 4.5}
            axes.plot(*thinned(steps, values), color=held_out, markeredgecolor="white", label=eval_label, **style)
    axes.set_title(label(panel.title), loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel(panel.unit, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if axes.get_legend_handles_labels()[1] != ["training"]:  # a single training curve needs no legend
        axes.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", labelcolor=INK)
