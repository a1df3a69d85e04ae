"""Settings of `onecard sft`."""

from __future__ import annotations

from dataclasses import dataclass

from onecard.config.base import PolicyTrainConfig, option


@dataclass(frozen=True, kw_only=True)
class SFTConfig(PolicyTrainConfig):
    """Supervised fine-tuning on `text`, `messages`, or `prompt` + `completion` rows."""

    completion_only_loss: bool = option(True, "With prompt + completion rows, train only on the completion.")
    assistant_only_loss: bool = option(True, "With messages, train only on the assistant's turns.")
