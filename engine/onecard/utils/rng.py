"""Random states that depend only on a seed and a position in the run, not on other random numbers of the process."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*key: object) -> int:
    """A 64-bit seed: the first 8 bytes of the SHA-256 of `repr(key)`."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


@contextmanager
def seeded_rng(device: torch.device, *key: object) -> Iterator[None]:
    """Context in which the generators of torch, Python and numpy are seeded by `key`; at exit they are restored.

    The samples of a step then do not depend on random numbers that evaluations or reward functions drew before, and a
    resumed run draws the same samples.
    """
    seed = seed_of(*key)
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def rng_restored_on_error(device: torch.device) -> Iterator[None]:
    """Context that restores torch's generators if a RuntimeError is raised, so that a retry draws the same numbers."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    except RuntimeError:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
        raise
