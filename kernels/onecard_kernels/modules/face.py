"""What all faces share."""

from __future__ import annotations

from typing import Any

from torch import nn


class Face(nn.Module):
    """Keeps the keywords that every call gets."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
