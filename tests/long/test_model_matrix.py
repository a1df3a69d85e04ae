"""Every family of the matrix is exact or refused by name, and docs/models.md says which. `make test-long`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.families import FAMILIES
from tests.models.matrix import make_row

pytestmark = pytest.mark.long
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cell_is_exact_or_refused(name: str) -> None:
    row = make_row(name)
    assert not row.wrong
    assert f"| {name} | {row.how} |" in PAGE.read_text(encoding="utf-8")
