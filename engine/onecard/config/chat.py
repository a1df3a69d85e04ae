"""Settings of `onecard chat`."""

from __future__ import annotations

from dataclasses import dataclass

from onecard.config.base import SamplingConfig, option


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """Chat with a model or an adapter in the terminal."""

    system: str = option("", "System message, the first of the conversation.")
    max_new_tokens: int = option(256, "Longest answer in tokens.", least=1)
    temperature: float = option(0.7, "Divides the logits; 0: the likeliest token each time.", least=0)
