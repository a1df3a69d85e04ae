"""Parameters of a test of which `make test` runs some; `make test-all` runs all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def grid(cases: Iterable[Any], usual: Collection[Any]) -> list[Any]:
    """All cases; those that are not in `usual` marked `grid`."""
    return [pytest.param(case, marks=() if case in usual else pytest.mark.grid) for case in cases]
