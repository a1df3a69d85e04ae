"""Settings of `onecard reward`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onecard.config.base import TrainConfig, option, raise_first

Activation = Literal["none", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """Reward model (an adapter with a scalar head) from pairs (`chosen`, `rejected`, optionally `margin`), scores
    (`completion`, `score`) or rankings (`completions`, best first), each with `prompt`.
    """

    center_rewards_coefficient: float = option(
        0.0, "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0; for pairs and rankings.", least=0
    )
    share_prompts: bool = option(True, "Run a prompt once for its answers: equal up to rounding. Needs padding_free.")
    score_activation: Activation = option(
        "none", "sigmoid: the sigmoid of the head's output is fitted to the scores, which must be from 0 to 1."
    )
    normalize_scores: bool = option(
        False, "Shift and scale the trained head so that training rows' scores have mean 0 and standard deviation 1."
    )

    def validate(self) -> None:
        super().validate()
        raise_first({
            "normalize_scores: with score_activation sigmoid, scores lie in 0 to 1 and cannot have mean 0; leave one "
            "of the two out.": self.normalize_scores and self.score_activation == "sigmoid",
        })  # fmt: skip
