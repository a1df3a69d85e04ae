"""Pairs and labelled answers for the tests of `onecard dpo`, and a policy that is not its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from onecard.config import DPOConfig
from onecard.data.batches import LabelledSequence, PreferencePair, TokenSequence
from onecard.models.build import load_roles
from onecard.models.roles import Roles


def text(length: int, seed: int, prompt: int = 2) -> TokenSequence:
    """A prompt of `prompt` tokens and a random answer of `length`."""
    response = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenSequence((5, 6, 7, 8)[:prompt] + tuple(response), (False,) * prompt + (True,) * length)


PAIRS = [PreferencePair(text(3 + i, i), text(6 - i, 10 + i)) for i in range(4)]
# The chosen answers are of one length, so that TRL's mean over tokens is a mean over pairs of means over tokens.
LEVEL = [PreferencePair(text(5, 20 + i), text(2 + 2 * i, 30 + i)) for i in range(4)]
LABELLED = [
    LabelledSequence(text(3 + i, 40 + i), i in (0, 1, 3), mismatched=text(3 + (i + 1) % 5, 41 + i)) for i in range(5)
]


def moved(roles: Roles, seed: int = 1, by: float = 0.05) -> Roles:
    """Away from the reference, where all answers are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return roles


def load(model: Path, **settings: Any) -> Roles:
    """Policy and reference as `onecard dpo` loads them."""
    return load_roles(DPOConfig(model=str(model), **settings), trained="policy", reference=True)


def labelled_rows(path: Path, count: int = 24) -> Path:
    """`prompt`, `completion`, `label` rows: every second answer is a good one."""
    words = ["cat", "dog", "hen", "cow", "fox"]
    rows = [
        {
            "prompt": f"Tell me about the {words[i % 5]} number {i}.",
            "completion": f" bad {words[(i + 1) % 5]} mat" if i % 2 else f" The {words[i % 5]} is a good answer.",
            "label": i % 2 == 0,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
