"""Random draws that depend on a seed and a place in the run, and on nobody else's draws."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*place: object) -> int:
    """A seed of 64 bits, made of `place`."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "big")


@contextmanager
def seeded_rng(device: torch.device, *place: object) -> Iterator[None]:
    """Inside, torch, Python and numpy draw from a state made of `place`; outside, all is as if nothing had been drawn.

    So what is sampled in a step cannot depend on what an evaluation or a reward function drew before it, or on a seed
    that one has set, and a run that goes on draws what it would have drawn.
    """
    seed = seed_of(*place)
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
    """Where what is inside fails, torch's generators go back to where they were: done again, it draws the same."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    except RuntimeError:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
        raise
