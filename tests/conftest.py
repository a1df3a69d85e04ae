"""Shared fixtures. Models and data outside the repository are used where they are, and skipped with a reason if not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_path(relative: str) -> Path:
    """A file or folder of the shared data, or a skip that names it."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative} in ../shared/data beside the repository")
    return path


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """A pretrained Llama of 656 K parameters."""
    return shared_path("models/TinyStories-656K")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A pretrained Llama of 260 K parameters whose BOS is its EOS."""
    return shared_path("models/stories260K")


@pytest.fixture(scope="session")
def politeness() -> Path:
    """1094 preference pairs."""
    return shared_path("prefs/rasbt_politeness.jsonl")
