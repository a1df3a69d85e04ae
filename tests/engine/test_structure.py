"""Imports of the engine point one way, and its top level stays small (`tests/structure.py` has the layers)."""

from __future__ import annotations

import sys

import pytest

from tests import structure


def test_imports_point_one_way_without_circles():
    graph = structure.imports(structure.modules())
    assert structure.circles(graph) == []
    assert structure.upward(graph) == []
    assert set(structure.top_level()) == set(structure.LAYERS)
    assert len(structure.LAYERS) <= 10


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_product_is_five_calls_from_linear_logprobs(backend):
    if backend == "triton" and "triton" not in sys.modules:
        pytest.importorskip("triton")
    codes = structure.way_to_the_product(backend)
    assert codes[0].co_name == "linear_logprobs"
    assert len(codes) - 1 <= 5, [code.co_name for code in codes]
