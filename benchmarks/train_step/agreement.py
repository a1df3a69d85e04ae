"""Whether ours and a peer did the same thing in their first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from benchmarks.train_step.dpo import SAME
from benchmarks.train_step.results import OURS, Result

# By which loss, rewards and gradient norm of the first step may differ: absolutely, and relative to themselves. In
# bf16, log-probs of hundreds of tokens are added up, each with a rounding of its own, and a reward is a tenth of them.
CLOSE = {torch.float32: (2e-3, 1e-3), torch.bfloat16: (0.25, 0.25)}


def disagreement(mine: Mapping[str, float], theirs: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What of a first step is not the same, if anything."""
    absolute, relative = CLOSE[dtype]
    for name in SAME:
        if not math.isclose(mine[name], theirs[name], rel_tol=relative, abs_tol=absolute):
            return f"{name} of the first step is {mine[name]:.6g}, and {theirs[name]:.6g} in"
    return None


def agreed(result: Result, dtype: torch.dtype) -> Result:
    """The result, or a refusal without times where ours and TRL do not do the same thing."""
    first = {row.name: row.first for row in result.rows if row.first}
    for name, found in first.items():
        wrong = OURS in first and disagreement(first[OURS], found, dtype)
        if wrong:
            return replace(result, rows=(), memory=(), refused=f"{wrong} {name}")
    return result
