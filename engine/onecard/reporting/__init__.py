"""Writes the `report.html` of a run or of the demo: one file with embedded images, without scripts or links."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.reporting.charts import Chart, chart_png, known_charts, other_charts, overview, slug
from onecard.reporting.page import Sample, Side, TableRow, write_page
from onecard.reporting.plots import Metrics, grid, png
from onecard.training.run_folder import CONFIG, METRICS, SAMPLES, write_folder
from onecard.utils.errors import OnecardError

PLOTS = "plots"


@dataclass(frozen=True)
class Stage:
    """One run of the demo: `Stage("DPO", "runs/demo/dpo")`."""

    name: str
    run_dir: Path | str


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. An incomplete last line is ignored; other invalid lines raise `OnecardError`."""
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
    """From a `samples.jsonl`: the responses to the same prompts at the first, a middle and the last evaluation.

    Empty if there is no such file, or if it has fewer than two evaluations.
    """
    rows = read_metrics(path) if path.exists() and path.stat().st_size else []
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return []
    middle = steps[len(steps) // 2]
    headings = {steps[0]: "before", middle: f"step {middle}", steps[-1]: "after"}
    columns = [[row for row in rows if row["step"] == step] for step in headings]
    return [
        Sample(
            answers[0]["prompt"],
            tuple(
                Side(name, answer["completion"], answer.get("score"))
                for name, answer in zip(headings.values(), answers, strict=True)
            ),
        )
        for answers in zip(*columns, strict=False)
    ]


def write_run_report(run_dir: Path | str, samples: Sequence[Sample] = ()) -> Path:
    """Write `plots/*.png` and `report.html` of one run. Returns the path of the report."""
    folder = Path(run_dir)
    samples = samples or read_samples(folder / SAMPLES)
    metrics = read_metrics(folder / METRICS)
    known = {chart.file: chart_png(metrics, chart) for chart in known_charts(metrics)}
    other = {chart.file: chart_png(metrics, chart) for chart in other_charts(metrics)}
    sections = [("Curves", _images(known)), ("Other metrics", _images(other))]
    _write_plots(folder, {**known, **other})
    return write_page(
        folder,
        title=f"Run {folder.resolve().name}",
        subtitle=f"{int(metrics[-1]['step'])} steps. Solid: training. Dashed: held-out data.",
        sections=[section for section in sections if section[1]],
        samples=samples,
        configs=_configs([Stage(folder.resolve().name, folder)]),
    )


def write_demo_report(
    folder: Path | str, stages: Sequence[Stage], table: Sequence[TableRow], samples: Sequence[Sample]
) -> Path:
    """Write `plots/*.png` and `report.html` of the demo. Returns the path of the report."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(stage.name, read_metrics(Path(stage.run_dir) / METRICS)) for stage in stages]
    plots = {"curves": png(grid(overview(runs)))}
    sections = [("All stages", _images(plots))]
    for stage, (name, metrics) in zip(stages, runs, strict=True):
        images = {
            f"{slug(name)}-{chart.file}": _run_chart_png(stage, metrics, chart) for chart in known_charts(metrics)
        }
        plots |= images
        sections.append((f"{name}: all curves", _images(images)))
    _write_plots(folder, plots)
    return write_page(
        folder,
        title="onecard demo",
        subtitle=f"A tiny language model trained from scratch: {', then '.join(stage.name for stage in stages)}.",
        table=table,
        sections=sections[:1],
        samples=samples,
        details=sections[1:],
        configs=_configs(stages),
    )


def _run_chart_png(stage: Stage, metrics: Metrics, chart: Chart) -> bytes:
    """A chart of a finished run as PNG: the file that the run's own report wrote if there is one, else drawn here."""
    written = Path(stage.run_dir) / PLOTS / f"{chart.file}.png"
    return written.read_bytes() if written.is_file() else chart_png(metrics, chart)


def _images(images: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Name and data URI of each image."""
    return [(name, f"data:image/png;base64,{base64.b64encode(data).decode()}") for name, data in images.items()]


def _configs(stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """Name and config.yaml of each stage that has one."""
    paths = [(stage.name, Path(stage.run_dir) / CONFIG) for stage in stages]
    return [(name, path.read_text(encoding="utf-8")) for name, path in paths if path.exists()]


def _write_plots(folder: Path, plots: Mapping[str, bytes]) -> None:
    """Replace the folder of plots. `plots`: name -> PNG."""

    def write(temporary: Path) -> None:
        for name, data in plots.items():
            (temporary / f"{name}.png").write_bytes(data)

    write_folder(folder, PLOTS, write)


__all__ = [
    "Sample",
    "Side",
    "Stage",
    "TableRow",
    "read_metrics",
    "read_samples",
    "write_demo_report",
    "write_run_report",
]
