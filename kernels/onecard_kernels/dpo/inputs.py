"""Checks of inputs and metrics of rewards, shared by the preference losses."""

from __future__ import annotations

from torch import Tensor

from .. import checks


def check_responses(logps: dict[str, Tensor], item: str) -> None:
    """Check for floating `[B]` tensors of one shape, on one device, without NaN."""
    like_name, like = next(iter(logps.items()))
    checks.floating(like_name, like)
    if like.dim() != 1:
        raise ValueError(f"{like_name} has shape {tuple(like.shape)}, expected [B], one value per {item}")
    for name, value in logps.items():
        checks.alike(name, value, like_name, like)
        checks.no_nan(name, value)


def check_lengths(chosen: Tensor | None, rejected: Tensor | None, like_name: str, like: Tensor) -> None:
    """Check the lengths of responses in tokens. Raises if only one of the two is given."""
    given = {"chosen_lengths": chosen, "rejected_lengths": rejected}
    for name, value in given.items():
        if value is None:
            continue
        checks.tensor(name, value)
        checks.shape(name, value, like.shape, f"the shape of {like_name}")
        checks.device(name, value, like_name, like)
        checks.no_nan(name, value)
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]} is None, expected both chosen_lengths and rejected_lengths, or neither")


def check_weights(
    weights: Tensor | None, normalizer: float | Tensor | None, like_name: str, like: Tensor
) -> float | Tensor | None:
    """Check weights and normalizer. Returns the normalizer, with a NumPy number as a Python number."""
    if weights is not None:
        checks.alike("weights", weights, like_name, like)
        checks.no_nan("weights", weights)
    return checks.normalizer(normalizer)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b; 0 with zero gradient where both are the same infinity."""
    return (a - b).masked_fill((a == b) & a.isinf(), 0.0)


def reward_metrics(chosen: Tensor, rejected: Tensor, divisor: float | Tensor) -> dict[str, Tensor]:
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": difference(chosen, rejected),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }
    return {name: value.sum() / divisor for name, value in per_pair.items()}
