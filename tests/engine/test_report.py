"""Reports: what they draw, that they escape what they show, that they load nothing, and how they fail."""

import json
import math
import re

import pytest

from onecard import reporting
from onecard.reporting import Sample, Side, Stage, TableRow, plots
from onecard.utils.errors import OnecardError

EVIL = "<script>alert('x')</script> & \"quotes\""


def write_metrics(folder, rows, config="model: tiny\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def dpo_rows(steps=12):
    train = [
        {"step": step, "epoch": step / steps, "loss": 0.7 - 0.03 * step, "rewards/margins": 0.2 * step,
         "rewards/accuracies": 0.5 + 0.03 * step, "grad_norm": 1.0, "learning_rate": 1e-3}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    held_out = [{"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.8} for step in (0, steps)]
    return [held_out[0], *train, held_out[1]]


def assert_self_contained(html):
    page = re.sub(r"data:image/png;base64,[\w+/=]*", "", html)
    assert not re.search(r"https?://|//[a-z]|<script|<link|<iframe|@import|url\(", page)
    sources = re.findall(r'(?:src|href|srcset|data)="([^"]*)"', html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


# --- metrics ---


def test_read_metrics_leaves_out_a_last_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert reporting.read_metrics(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No metrics at"),
        ("", "has no rows"),
        ('{"step"', "has no rows"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2"),
        ('{"loss": 1}\n{"step": 2}\n', "line 1"),
    ],
)
def test_read_metrics_fails_in_one_line(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(OnecardError, match=message) as caught:
        reporting.read_metrics(path)
    assert "\n" not in str(caught.value)
    assert "metrics.jsonl" in str(caught.value)


# --- plots ---


def test_points_are_the_finite_numbers_of_one_metric():
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 3.0},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": "high"},
        {"step": 5, "loss": None},
        {"step": 6, "loss": 1},
    ]
    assert plots.points(rows, "loss") == ([1.0, 6.0], [2.0, 1.0])


def test_smooth_keeps_a_constant_and_the_length():
    assert plots.smooth([2.0] * 300) == pytest.approx([2.0] * 300)
    assert plots.smooth([]) == []
    assert plots.smooth([1.0, 4.0, 1.0]) == [2.5, 2.0, 2.5]


def test_curves_show_training_and_held_out_in_one_axes():
    figure = plots.curves(dpo_rows(), ["loss"], "Loss", "nats")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Loss"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "nats")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "held out"]
    raw, smoothed, held_out = axes.get_lines()
    assert list(raw.get_ydata()) == plots.points(dpo_rows(), "loss")[1]
    assert list(smoothed.get_ydata()) == plots.smooth(list(raw.get_ydata()))
    assert list(held_out.get_xdata()) == [0, 12]


def test_the_same_curves_give_the_same_png():
    once, again = (plots.png(plots.curves(dpo_rows(), ["loss"], "Loss")) for _ in range(2))
    assert once.startswith(b"\x89PNG")
    assert once == again


def test_a_single_row_and_a_missing_metric_can_be_drawn():
    assert plots.png(plots.curves([{"step": 1, "loss": 1.0}], ["loss", "absent"], "Loss")).startswith(b"\x89PNG")


# --- the report of a run ---


def test_run_report_draws_what_was_logged(tmp_path):
    rows = [{**row, "odd/thing": 1.0 * row["step"]} for row in dpo_rows()]
    path = reporting.write_run_report(write_metrics(tmp_path / "run", rows))
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "report.html"
    assert_self_contained(html)
    drawn = {path.stem for path in (tmp_path / "run" / "plots").iterdir()}
    assert drawn == {"loss", "accuracy", "margin", "grad_norm", "learning_rate", "other-0-odd-thing"}
    assert "Other metrics" in html
    assert "model: tiny" in html
    assert html.count("<img") == len(drawn)


def test_run_report_can_be_written_again(tmp_path):
    folder = write_metrics(tmp_path / "run", [{"step": 1, "loss": 1.0, "odd": 1.0}])
    reporting.write_run_report(folder)
    write_metrics(folder, [{"step": 1, "loss": 1.0}], config=None)
    reporting.write_run_report(folder)
    assert [path.name for path in (folder / "plots").iterdir()] == ["loss.png"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_run_report_escapes(tmp_path):
    rows = [{"step": 1, EVIL: 1.0}]
    folder = write_metrics(tmp_path / "run", rows, config=f"model: {EVIL}\n")
    html = reporting.write_run_report(folder, [Sample(EVIL, (Side(EVIL, EVIL), Side("after", EVIL)))]).read_text(
        encoding="utf-8"
    )
    assert_self_contained(html)
    assert "&lt;script&gt;" in html


def test_run_without_metrics_is_one_clear_line(tmp_path):
    with pytest.raises(OnecardError, match=r"No metrics at .*metrics\.jsonl"):
        reporting.write_run_report(tmp_path)


# --- the report of the demo ---


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("demo")
    sft = [{"step": step, "loss": 5.0 / step, "learning_rate": 1e-3} for step in range(1, 9)]
    reward = [{"step": step, "loss": 0.6, "accuracy": 0.9, "eval_accuracy": 0.9} for step in range(1, 9)]
    runs = {"SFT": sft, "Reward model": reward, "DPO": dpo_rows()}
    stages = [Stage(name, write_metrics(tmp_path / name, rows, f"name: {name}\n")) for name, rows in runs.items()]
    table = [TableRow("DPO", "held-out accuracy", "93.1 %", f"pairs ranked right {EVIL}")]
    samples = [
        Sample(
            "Where is the red hat?",
            (Side("SFT", f" What now? {EVIL}", -1.25), Side("DPO", " Gladly! By the door.", 2.5)),
        )
    ]
    return reporting.write_demo_report(tmp_path / "demo", stages, table, samples)


def test_demo_report_has_table_curves_samples_and_configs(demo):
    html = demo.read_text(encoding="utf-8")
    for text in ("93.1 %", "held-out accuracy", "Where is the red hat?", "-1.25", "+2.50", "Gladly! By the door."):
        assert text in html
    assert html.count("<details>") == 6  # curves and settings of each of three stages
    assert "name: Reward model" in html
    pictures = {path.name for path in (demo.parent / "plots").iterdir()}
    assert {"curves.png", "sft-loss.png", "reward-model-accuracy.png", "dpo-margin.png"} <= pictures
    assert html.count("<img") == len(pictures)


def test_demo_report_is_self_contained_and_escaped(demo):
    html = demo.read_text(encoding="utf-8")
    assert_self_contained(html)
    assert html.count("&lt;script&gt;") == 2
    assert "light-dark(" in html


def test_demo_report_takes_the_pictures_of_the_runs_own_reports(tmp_path, monkeypatch):
    stages = [Stage("DPO", write_metrics(tmp_path / "dpo", dpo_rows(), "name: DPO\n"))]

    def plots(name):
        folder = reporting.write_demo_report(tmp_path / name, stages, [], []).parent / "plots"
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    drawn_here = plots("before")
    reporting.write_run_report(stages[0].run_dir)
    monkeypatch.setattr(reporting, "chart_png", lambda *arguments: pytest.fail("a chart was drawn again"))
    assert plots("after") == drawn_here


def test_demo_report_names_the_stage_that_logged_nothing(tmp_path):
    with pytest.raises(OnecardError, match=r"dpo.*metrics\.jsonl"):
        reporting.write_demo_report(tmp_path / "demo", [Stage("DPO", tmp_path / "dpo")], [], [])
