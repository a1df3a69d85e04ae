"""Inputs of rewards: texts, tokens, the other columns of the dataset, and the models."""

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
        completions      (" 4", " five")             text after the prompt, without special tokens and stop strings
        completion_ids   ((604, 2), (1936,))         as sampled, including end tokens
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

    def only(self, index: int) -> Answers:
        """Answer `index` as a batch of one."""
        return Answers(
            self.prompts[index : index + 1],
            self.completions[index : index + 1],
            self.completion_ids[index : index + 1],
            {name: values[index : index + 1] for name, values in self.columns.items()},
        )

    def keywords(self) -> dict[str, list[Any]]:
        """Keyword arguments of a reward function, as in TRL: lists that the function may change.

        `prompts`, `completions` and `completion_ids` take precedence over columns of the same name.
        """
        return {name: list(values) for name, values in self.columns.items()} | {
            "prompts": list(self.prompts),
            "completions": list(self.completions),
            "completion_ids": [list(ids) for ids in self.completion_ids],
        }


@dataclass(frozen=True)
class RewardInput:
    """B answers as built-in rewards and reward models get them. Reward functions get only `answers`."""

    roles: Roles
    tokenizer: Any
    prompts: Sequence[Prompt]
    episodes: Sequence[Episode]
    answers: Answers
    batch_size: int | TokenBudget  # of the models' forward passes


ModelReward: TypeAlias = Callable[[RewardInput], list[float]]  # a built-in reward: one number for each answer
