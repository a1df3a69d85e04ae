"""The weighted sum of several rewards: score = sum over the parts of weight * part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from onecard.utils.errors import OnecardError

MAX_SCORE = 1e18  # largest absolute score: in fp32, the squares of much larger ones overflow
# One number for each answer; of a dense reward, one for each token of each answer.
Part: TypeAlias = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Scores:
    """Scores of B answers. An answer's score is its `terminal` plus the sum of its `dense`; no reward is in both.

    `terminal` fp32 [B]: the weighted sum of the rewards with one number per answer, which PPO puts on the last token.
    `dense`: the weighted sum of the per-token rewards, fp32 [k] for an answer of k tokens; None if no reward is dense.
    `parts`: each reward fp32 [B] without its weight; of a dense reward, the sum over the answer's tokens.

    Two answers, of two tokens and of one, with a reward model of weight 1 and a dense reward of weight 0.1:

        parts    {"reward_model": [0.5, -1.0], "dense": [3.0, 20.0]}
        terminal [0.5, -1.0]
        dense    [[0.1, 0.2], [2.0]]
        sums     [0.8, 1.0]
    """

    terminal: Tensor
    parts: dict[str, Tensor]
    dense: list[Tensor] | None = None

    @property
    def sums(self) -> Tensor:
        """The answers' scores, fp32 [B], as in metrics: `terminal` plus the sums of `dense`."""
        if self.dense is None:
            return self.terminal
        return (self.terminal.double() + torch.stack([rewards.double().sum() for rewards in self.dense])).float()


def is_dense(part: Part) -> TypeGuard[Sequence[Sequence[float]]]:
    """Whether a part has one number per token."""
    return bool(part) and isinstance(part[0], Sequence)


def is_per_answer(part: Part) -> TypeGuard[Sequence[float]]:
    """Whether a part has one number per answer."""
    return not is_dense(part)


def combine(parts: Mapping[str, Part], weights: Mapping[str, float]) -> Scores:
    """Sum the weighted parts, in float64 so that their order does not matter.

    Raises OnecardError if a part or the sum is not finite in fp32, or beyond MAX_SCORE.
    """
    if not parts or parts.keys() != weights.keys():
        raise ValueError(f"parts {list(parts)} and weights {list(weights)} must have the same names, at least one.")
    counts = {name: len(values) for name, values in parts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"parts must have one score for each answer, got {counts}.")
    answers = next(iter(counts.values()))
    tokens = {name: [to_float64(values) for values in part] for name, part in parts.items() if is_dense(part)}
    per_answer = {name: to_float64(part) for name, part in parts.items() if is_per_answer(part)}
    terminal = weighted_sum({name: weights[name] for name in per_answer}, per_answer, answers).float()
    dense = None
    if tokens:
        by_answer = [{name: values[index] for name, values in tokens.items()} for index in range(answers)]
        lengths = [len(next(iter(columns.values()))) for columns in by_answer]
        dense = [
            weighted_sum({name: weights[name] for name in tokens}, columns, length).float()
            for columns, length in zip(by_answer, lengths, strict=True)
        ]
    sums = {name: torch.stack([values.sum() for values in tokens[name]]) for name in tokens}
    scores = Scores(terminal, {name: (sums | per_answer)[name].float() for name in parts}, dense)
    columns = {**scores.parts, "the weighted sum": scores.sums}
    for limit, expected in ((torch.finfo(torch.float32).max, "a finite number"), (MAX_SCORE, f"at most {MAX_SCORE:g}")):
        for name, column in columns.items():
            wrong = ~(column.abs() <= limit)  # NaN too
            if wrong.any():
                index = int(wrong.nonzero()[0])
                raise OnecardError(
                    f"reward: {name} is {column[index].item()} for response {index + 1} of {len(column)}; "
                    f"expected {expected}."
                )
    return scores


def to_float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def weighted_sum(weights: Mapping[str, float], columns: Mapping[str, Tensor], size: int) -> Tensor:
    """sum over names of weight * column, fp64 [size]; zeros if there are no columns."""
    weighted = [weight * columns[name] for name, weight in weights.items()]
    return torch.stack([*weighted, torch.zeros(size, dtype=torch.float64)]).sum(0)


def reward_weights(names: Sequence[str], given: Sequence[float]) -> dict[str, float]:
    """Name -> weight of each reward; 1 each if none are given. Raises OnecardError if the counts differ."""
    if given and len(given) != len(names):
        raise OnecardError(
            f"reward_weights: {len(given)} given ({', '.join(f'{weight:g}' for weight in given)}), expected "
            f"{len(names)}: one for each of {', '.join(names)}; or none, for a weight of 1 each."
        )
    bad = next((weight for weight in given if not math.isfinite(weight)), None)
    if bad is not None:
        raise OnecardError(f"reward_weights: {bad}, expected finite numbers.")
    return dict(zip(names, given or [1.0] * len(names), strict=True))


def apply_missing_eos_penalty(scores: Tensor, finished: Sequence[bool], penalty: float) -> Tensor:
    """`scores` [B], minus `penalty` for each response that is not `finished` (TRL's `missing_eos_penalty`)."""
    if scores.shape != (len(finished),):
        raise ValueError(f"scores: expected shape ({len(finished)},) as finished has, got {tuple(scores.shape)}.")
    is_finished = torch.tensor(list(finished), dtype=torch.bool, device=scores.device)
    return torch.where(is_finished, scores, scores - penalty)
