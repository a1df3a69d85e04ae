"""The table of many rows: each row is a process that ends, and the text goes into its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cli, records, render, scale


@pytest.mark.grid
def test_every_row_is_a_process_that_ends(tmp_path: Path) -> None:
    words = ["--rows", "300", "--report_rows", "50", "--rounds", "2", "--out", str(tmp_path)]
    assert cli.main(scale.command, words) == 0
    [path] = tmp_path.glob("scale-*.json")
    report = records.load(path)
    [case] = report.cases
    assert len(case.rows) == 5
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 and row.peak_bytes > 1 << 20 for row in case.rows)
    text = render.summaries(report, path.name)["scale"]
    assert text in render.updated((records.ROOT / "docs" / "data.md").read_text(), {"scale": text})
