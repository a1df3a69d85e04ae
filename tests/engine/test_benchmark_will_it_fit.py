"""The table of what fits: cells by hand, and the committed one against its file and against the engine as it is."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks import will_it_fit
from benchmarks.records import Case, Recorder, Row
from benchmarks.render import OPENING
from onecard.commands.fit.cards import GIB, Card


def rows(*peaks: float) -> list[dict[str, object]]:
    own = {"model": "A", "algorithm": "ppo"}
    return [{**own, "level": level, "peak_gib": peak} for level, peak in zip(will_it_fit.LEVELS, peaks, strict=True)]


def test_a_cell_is_the_first_level_that_the_card_holds():
    """12 GB have 11.52 GiB to give; a peak of 10 GiB takes 10 + 0.5 + 0.5, one of 10.6 takes 11.63."""
    assert will_it_fit.cell(rows(10.0, 8.0, 6.0), 12, set()) == "16 bit 11.0"
    assert will_it_fit.cell(rows(10.6, 8.0, 6.0), 12, {("A", "ppo", 12, False)}) == "4 bit 8.9"
    assert will_it_fit.cell(rows(20.0, 10.6, 6.0), 12, {("A", "ppo", 12, True)}) == "least 6.8 ✓"
    assert will_it_fit.cell(rows(20.0, 12.0, 10.6), 12, {("A", "ppo", 12, True)}) == "–"
    assert will_it_fit.needed({"peak_gib": 10.0}, 12) == pytest.approx(Card("", 12 * GIB).needed(10 * GIB) / GIB)


def test_algorithms_with_the_same_settings_share_a_row(monkeypatch):
    """sft and dpo both fit in 16 bit: one row, with the larger 9.5 + 0.5 + 0.475 GiB. ppo needs 4 bit."""
    monkeypatch.setattr(will_it_fit, "MODELS", ("A",))
    monkeypatch.setattr(will_it_fit, "CARDS", (12,))
    peaks = {"sft": (9.4, 8.0, 6.0), "dpo": (9.5, 8.0, 6.0), "ppo": (20.0, 8.0, 6.0)}
    found = [{**row, "algorithm": algorithm} for algorithm, each in peaks.items() for row in rows(*each)]
    text = will_it_fit.table({"rows": found, "dirty": False, "commit": "c0ffee00"}, set())
    assert text.splitlines()[2:4] == ["| A | sft, dpo | 16 bit 10.5 |", "|  | ppo | 4 bit 8.9 |"]


def test_steps_that_ran_under_a_card_s_cap_are_marked(tmp_path):
    def case(kind: str, cap: float, seconds: tuple[float, ...] = (1.0,), refused: str | None = None) -> Case:
        about = {"model": "Llama-3.1-8B", "cap_gib": cap, "settings": {"load_in_4bit": cap < 20}}
        return Case(kind, "", {}, "", rows=(Row("onecard", "ours", seconds=seconds),), about=about, refused=refused)

    cases = (case("ppo", 10.5), case("dpo", 23.0, ()), case("dpo", 0.0), case("dpo", 10.5, refused="wrong"))
    recorder = Recorder("train-step", torch.device("cpu"), out=tmp_path / "some-card")
    recorder.put(cases)
    assert will_it_fit.measured(tmp_path) == {("Llama-3.1-8B", "ppo", 12, True)}


def test_the_readme_has_the_table_of_the_committed_plans(tmp_path):
    copy = tmp_path / "README.md"
    committed = will_it_fit.README.read_text(encoding="utf-8")
    copy.write_text(committed, encoding="utf-8")
    done = CliRunner().invoke(will_it_fit.command, ["--render", "--readme", str(copy)])
    assert done.exit_code == 0, done.output
    assert OPENING.format(will_it_fit.NAME) in committed
    assert copy.read_text(encoding="utf-8") == committed


@pytest.mark.parametrize(
    ("model", "algorithm", "level"),
    [("Qwen2.5-0.5B", "sft", "4 bit"), pytest.param("Gemma-2-2B", "dpo", "16 bit", marks=pytest.mark.grid)],
)
def test_the_committed_plans_are_those_of_this_engine(model, algorithm, level):
    """An engine that takes more or less memory than the table says needs a new table."""
    plans = json.loads(will_it_fit.PLANS.read_text(encoding="utf-8"))["rows"]
    [known] = [row for row in plans if (row["model"], row["algorithm"], row["level"]) == (model, algorithm, level)]
    assert will_it_fit.plan(algorithm, model, level)["peak_gib"] == pytest.approx(known["peak_gib"], rel=0.01)
