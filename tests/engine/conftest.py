"""Pretrained models ready to be sampled from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.rollout_material import Player, load


@pytest.fixture(scope="session")
def stories656(tinystories: Path) -> Player:
    return load(tinystories)


@pytest.fixture(scope="session")
def stories260(stories260k: Path) -> Player:
    return load(stories260k)


@pytest.fixture
def player(stories656: Player) -> Player:
    return stories656
