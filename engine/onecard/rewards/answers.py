"""What a reward looks at: the texts, the tokens, whatever else the dataset's rows hold, and the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onecard.data import Prompt
from onecard.data.batches import Episode
from onecard.models.micro_batching import TokenBudget
from onecard.models.roles import Roles


@dataclass(frozen=True)
class Answers:
    """B responses, each with its prompt; every field has one entry per response.

    Two answers to the row `{"prompt": "2 + 2 =", "solution": "4"}`:

        prompts          ("2 + 2 =", "2 + 2 =")
        completions      (" 4", " five")             text behind the prompt, without special tokens and stop strings
        completion_ids   ((604, 2), (1936,))         as sampled, with the tokens that ended it
        columns          {"solution": ("4", "4")}
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    columns: Mapping[str, tuple[Any, ...]]

    def __post_init__(self) -> None:
        for name, values in self.keywords().items():
            if len(values) != len(self):
                raise ValueError(f"{name}: {len(values)} entries for {len(self)} prompts.")

    def __len__(self) -> int:
        return len(self.prompts)

    def only(self, place: int) -> Answers:
        """One of the answers, as a batch of its own."""
        return Answers(
            self.prompts[place : place + 1],
            self.completions[place : place + 1],
            self.completion_ids[place : place + 1],
            {name: values[place : place + 1] for name, values in self.columns.items()},
        )

    def keywords(self) -> dict[str, list[Any]]:
        """TRL's keyword arguments of a reward function, as lists that it may change; a column cannot replace a text."""
        return {name: list(values) for name, values in self.columns.items()} | {
            "prompts": list(self.prompts),
            "completions": list(self.completions),
            "completion_ids": [list(ids) for ids in self.completion_ids],
        }


@dataclass(frozen=True)
class RewardInput:
    """All that is known of B answers. Reward functions see `answers`; what is built in may ask the models too."""

    roles: Roles
    tokenizer: Any
    prompts: Sequence[Prompt]
    episodes: Sequence[Episode]
    answers: Answers
    batch_size: int | TokenBudget  # of the passes that models are asked in


ModelReward: TypeAlias = Callable[[RewardInput], list[float]]  # a built-in reward: one number for each answer
