"""What a run leaves: its file, the tables and plots made from it, and the verdicts on its targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import measure, records, render, tables, targets
from benchmarks.records import LIMIT, Report, Result, Row
from benchmarks.targets import Target, Verdict


def result(*rows: Row, name: str = "linear_logprobs") -> Result:
    return Result(name, "hidden states to log-probabilities", "N x D x V", "float32", {"frozen": "both ways"}, rows)


def report(*results: Result, **changes: object) -> Report:
    values: dict[str, object] = {
        "device": "cpu",
        "machine": "a machine",
        "folder": "cpu-2-cores",
        "quick": False,
        "complete": True,
        "clock": "wall time",
        "repeats": 3,
        "date": "2026-01-02T03:04Z",
        "commit": "0123456789abcdef",
        "dirty": False,
        "load": 0.5,
        "versions": {"torch": "9.9"},
        "results": results,
    }
    return Report(**{**values, **changes})


def row(candidate: str, role: str, seconds: tuple[float, ...], **changes: object) -> Row:
    spread = measure.spread(seconds)
    values = {"seconds": seconds, "median": spread.median, "q1": spread.q1, "q3": spread.q3, **changes}
    return Row("s", {"N": 5, "D": 6, "V": 7}, "frozen", candidate, role, **values)


ROWS = (
    row(
        "onecard",
        "ours",
        (0.1, 0.2, 0.4),
        peak_bytes=3 << 20,
        errors={"logp": 1e-6, "dHidden": 2e-6},
        of_limit=0.75,
    ),
    row("eager", "peer", (0.2, 0.5, 0.6), peak_bytes=150 << 20, errors={"logp": 3e-6}, of_limit=0.3, launches=12),
    Row("s", {"N": 5, "D": 6, "V": 7}, "frozen", "Liger", "peer", reason="no | such module"),
    row("bare GEMMs, 2u", LIMIT, (0.15, 0.15, 0.15), gemms=2, rate=2e12, of_limit=1.0),
    row("copy", LIMIT, (0.01, 0.01, 0.01), rate=3e10),
)
RUN = report(result(*ROWS))


def test_report_survives_the_file_and_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.json"
    records.save(RUN, path)
    assert records.load(path) == RUN
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]  # no temporary file stays
    for text in ("{", "[]", "{}", '{"schema": 1, "rows": []}', '{"schema": 2, "results": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json is no benchmark report"):
            records.load(path)
    assert render.main([str(path)]) == 2


def test_file_name_tells_dirty_and_quick_runs_apart() -> None:
    assert records.file_name(report()) == "kernels-20260102T0304Z-0123456.json"
    assert records.file_name(report(dirty=True, quick=True)).endswith("-0123456-dirty-quick.json")


def test_markdown_has_the_numbers_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.save(report(result(*ROWS), dirty=True), path)
    made = render.render(path)
    assert [p.name for p in made] == ["run.md", "run-linear_logprobs-frozen.png"]
    assert made[1].read_bytes().startswith(b"\x89PNG")
    text = made[0].read_text()
    assert "DIRTY TREE" in text
    assert "0123456789ab" in text
    # medians of 0.1 0.2 0.4 and 0.2 0.5 0.6 s; the ratio is the median over rounds of 2, 2.5 and 1.5
    assert "| onecard | 200 | 150 to 300 | 1.00x (1.00 to 1.00) | 75% | 3.0 | – | 1.0e-06 | 2.0e-06 |" in text
    assert "| eager | 500 | 350 to 550 | 2.00x (1.75 to 2.25) | 30% | 150 | 12 | 3.0e-06 | – |" in text
    assert "| bare GEMMs, 2u (2 TFLOP/s) | 150 |" in text
    assert "no \\| such module" in text
    assert "DIRTY" not in render.markdown(RUN, "run.json")
    before = [p.read_bytes() for p in made]
    assert [p.read_bytes() for p in render.render(path)] == before


def test_every_cell_has_a_heading() -> None:
    columns = tables.columns_of(ROWS)
    assert (columns.errors, columns.launches) == (("logp", "dHidden"), True)
    for found in ROWS:
        assert len(columns.cells(found, ROWS[0])) == len(columns.headings)
    assert len(columns.brief(ROWS[0], ROWS[0])) == len(columns.brief_headings)


def test_readme_update_is_idempotent_and_touches_nothing_else(tmp_path: Path) -> None:
    path, readme = tmp_path / "results" / "run.json", tmp_path / "README.md"
    without_a_block = result(*ROWS, name="ppo_loss")
    records.save(report(result(*ROWS), without_a_block), path)
    other = "<!-- benchmark:gae -->\nkept\n<!-- /benchmark -->"
    block = "<!-- benchmark:linear_logprobs -->\nold\n<!-- /benchmark -->"
    readme.write_text(f"before\n{block}\nbetween\n{other}\nafter \\1\n")
    assert render.main([str(path), "--readme", str(readme)]) == 0
    once = readme.read_text()
    assert render.main([str(path), "--readme", str(readme)]) == 0
    assert readme.read_text() == once
    assert once.startswith("before\n<!-- benchmark:linear_logprobs -->\n| pass |")
    assert once.endswith(f"<!-- /benchmark -->\nbetween\n{other}\nafter \\1\n")
    assert "old" not in once
    assert "2.00x, 150 MiB" in once
    assert "results/run.json" in once


@pytest.mark.parametrize("text", ["no markers", "<!-- benchmark:linear_logprobs --> unclosed"])
def test_readme_without_markers_is_an_error_and_stays(tmp_path: Path, text: str, capsys) -> None:
    path, readme = tmp_path / "run.json", tmp_path / "README.md"
    records.save(RUN, path)
    readme.write_text(text)
    assert render.main([str(path), "--readme", str(readme)]) == 2
    assert readme.read_text() == text
    assert "expected one block" in capsys.readouterr().err


def test_readme_gets_every_block_it_has_a_marker_for(tmp_path: Path) -> None:
    path, readme = tmp_path / "run.json", tmp_path / "README.md"
    records.save(report(result(*ROWS), result(*ROWS, name="gae"), result(name="ppo_loss")), path)
    names = ("gae", "linear_logprobs", "ppo_loss")
    readme.write_text("\n".join(f"<!-- benchmark:{name} -->old<!-- /benchmark -->" for name in names))
    assert render.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.count("2.00x, 150 MiB") == 2
    assert text.count("old") == 1  # what was not measured keeps its numbers


# --- targets


def judged(*rows: Row, **changes: object) -> Verdict:
    """The verdict of a target on these rows."""
    values: dict[str, object] = {
        "device": "cpu",
        "benchmark": "linear_logprobs",
        "mode": "frozen",
        "shape": "s",
        "what": "speed",
        "figure": targets.over("onecard", "eager"),
        "bar": 0.45,
    }
    target = Target(**{**values, **changes})
    return Verdict(target, target.figure({r.candidate: r for r in rows}))


@pytest.mark.parametrize(
    ("changes", "figure", "met"),
    [
        ({}, 0.5, False),  # rounds of 1/2, 2/5, 2/3
        ({"bar": 0.5}, 0.5, True),
        ({"figure": targets.over("eager", "onecard"), "bar": 1.9, "at_least": True}, 2.0, True),
        ({"figure": targets.over("eager", "onecard"), "bar": 2.1, "at_least": True}, 2.0, False),
        ({"figure": targets.over("onecard", targets.GEMMS)}, 4 / 3, False),  # 2/3, 4/3, 8/3
        ({"figure": targets.of_limit("onecard"), "bar": 0.9, "at_least": True}, 0.75, False),
        ({"figure": targets.peak("onecard", minus=1 << 20, unit=1 << 20), "bar": 2}, 2.0, True),
        ({"figure": targets.error("logp"), "bar": 1e-7}, 1e-6, False),
        ({"figure": targets.over("onecard", "Liger")}, None, None),
        ({"figure": targets.over("onecard", "nobody")}, None, None),
        ({"figure": targets.peak("Liger")}, None, None),
        ({"figure": targets.launches}, None, None),
    ],
)
def test_a_target_is_met_or_missed_with_its_figure(changes: dict[str, object], figure, met) -> None:
    verdict = judged(*ROWS, **changes)
    assert verdict.figure == (None if figure is None else pytest.approx(figure))
    assert verdict.met is met
    assert verdict.cells[-1] == {None: "–", True: "met", False: "missed"}[met]


def test_every_target_is_a_case_of_the_usual_run() -> None:
    """A typing error in a name would say "not measured" for ever."""
    from benchmarks.suite import BENCHMARKS

    for target in targets.TARGETS:
        benchmark = BENCHMARKS[target.benchmark]
        assert target.mode in benchmark.modes
        assert target.shape in {shape.name for shape in benchmark.shapes[target.device].usual}
        names = [c.name for c in benchmark.candidates if target.mode in (c.modes or (target.mode,))]
        rows = {name: row(name, "peer", (1.0,), peak_bytes=1, of_limit=1.0, launches=1) for name in names}
        rows = {name: Row(**{**vars(r), "errors": {"logp": 1.0}}) for name, r in rows.items()}
        rows["bare"] = row("bare", LIMIT, (1.0,), gemms=2)
        assert target.figure(rows) is not None


def test_verdicts_stand_in_the_markdown_but_not_of_quick_runs(monkeypatch) -> None:
    target = judged(*ROWS).target
    monkeypatch.setattr(targets, "TARGETS", (target, Target(**{**vars(target), "device": "cuda"})))
    [verdict] = targets.verdicts(RUN)
    assert verdict.cells == ["speed", "at most 0.45x", "0.50x", "missed"]
    assert "| speed | at most 0.45x | 0.50x | missed |" in render.markdown(RUN, "run.json")
    assert targets.verdicts(report(result(*ROWS), quick=True)) == []
    assert "Targets" not in render.markdown(report(result(*ROWS), quick=True), "run.json")


def test_outside_of_a_repository_the_commit_is_what_one_is_told(monkeypatch) -> None:
    monkeypatch.setattr(records, "git", lambda *arguments: None)
    for told, expected in (("", ("unknown", True)), ("abc", ("abc", False)), ("abc-dirty", ("abc", True))):
        monkeypatch.setenv("ONECARD_COMMIT", told)
        assert records.commit() == expected
