"""Several rewards added up: total = sum over parts of weight * part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.errors import OnecardError


@dataclass(frozen=True)
class Scores:
    """`total` fp32 [B]: the weighted sum. `parts`: each reward fp32 [B] as it came, without its weight.

    Two answers judged by a reward model with weight 1 and by their length with weight 0.1:

        parts    {"reward_model": [0.5, -1.0], "length": [3.0, 20.0]}
        total    [0.8, 1.0]
    """

    total: Tensor
    parts: dict[str, Tensor]


def combine(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> Scores:
    """Add the parts up, in double precision so that their order does not matter."""
    if not parts or parts.keys() != weights.keys():
        raise ValueError(f"parts {list(parts)} and weights {list(weights)} must have the same names, at least one.")
    counts = {name: len(values) for name, values in parts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"parts must have one score for each answer, got {counts}.")
    columns = {name: torch.tensor(list(values), dtype=torch.float64) for name, values in parts.items()}
    total = torch.stack([weights[name] * column for name, column in columns.items()]).sum(0).float()
    scores = Scores(total, {name: column.float() for name, column in columns.items()})
    for name, column in {**scores.parts, "the weighted sum": total}.items():
        if not column.isfinite().all():
            place = int((~column.isfinite()).nonzero()[0])
            raise OnecardError(
                f"reward: {name} is {column[place].item()} for response {place + 1} of {len(column)}; "
                "expected a finite number."
            )
    return scores


def reward_weights(names: Sequence[str], given: Sequence[float]) -> dict[str, float]:
    """A weight for each reward by its name; 1 each where none are given."""
    if given and len(given) != len(names):
        raise OnecardError(
            f"reward_weights: {len(given)} given ({', '.join(f'{weight:g}' for weight in given)}), expected "
            f"{len(names)}: one for each of {', '.join(names)}; or none, which is 1 each."
        )
    bad = next((weight for weight in given if not math.isfinite(weight)), None)
    if bad is not None:
        raise OnecardError(f"reward_weights: {bad} is no finite number.")
    return dict(zip(names, given or [1.0] * len(names), strict=True))


def apply_missing_eos_penalty(scores: Tensor, finished: Sequence[bool], penalty: float) -> Tensor:
    """`scores` [B], less `penalty` where the response did not end by itself (TRL's `missing_eos_penalty`)."""
    if scores.shape != (len(finished),):
        raise ValueError(f"scores: expected shape ({len(finished)},) as finished has, got {tuple(scores.shape)}.")
    ended = torch.tensor(list(finished), dtype=torch.bool, device=scores.device)
    return torch.where(ended, scores, scores - penalty)
