"""Pretrained models ready to be sampled from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.rollout_material import LoadedPolicy, load


@pytest.fixture(scope="session")
def stories656(tinystories: Path) -> LoadedPolicy:
    return load(tinystories)


@pytest.fixture(scope="session")
def stories260(stories260k: Path) -> LoadedPolicy:
    return load(stories260k)


@pytest.fixture
def policy(stories656: LoadedPolicy) -> LoadedPolicy:
    return stories656
