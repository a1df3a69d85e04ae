"""The table of many rows: each row is a process that ends, and the text goes into its page."""

from __future__ import annotations

import pytest

from benchmarks.render import updated
from benchmarks.scale import PAGE, all_measured, table


@pytest.mark.long
def test_every_row_is_a_process_that_ends() -> None:
    found = all_measured(300, 50)
    assert len(found) == 5
    assert all(row.seconds > 0 and row.peak > 1 << 20 for row in found)
    text = table(found)
    assert text in updated(PAGE.read_text(), {"scale": text})
