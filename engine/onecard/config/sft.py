"""Settings of `onecard sft`."""

from __future__ import annotations

from dataclasses import dataclass

from onecard.config.base import PolicyTrainConfig, option


@dataclass(frozen=True, kw_only=True)
class SFTConfig(PolicyTrainConfig):
    """Supervised fine-tuning on `text`, `messages`, or `prompt` + `completion` rows."""

    completion_only_loss: bool = option(True, "With prompt + completion rows, learn the completion only.")
    assistant_only_loss: bool = option(True, "With messages, learn the assistant's turns only.")
