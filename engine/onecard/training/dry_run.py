"""`--dry_run`: what a training command would do, on standard output; nothing is written and nothing is trained.

All of it is YAML that `--config` takes: what is no setting is a comment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text
from torch import nn

from onecard.config import TrainConfig
from onecard.data import Prompt
from onecard.data.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence
from onecard.data.tokens import continuation_text
from onecard.models.roles import Roles
from onecard.utils.errors import escape_controls

Named = list[tuple[str, TokenSequence]]

# kind of example -> its sequences, each with what it is
SEQUENCES: dict[type, Callable[[Any], Named]] = {
    TokenSequence: lambda example: [("example", example)],
    PreferencePair: lambda example: [
        (f"chosen, margin {example.margin:g}" if example.margin else "chosen", example.chosen),
        ("rejected", example.rejected),
    ],
    ScoredSequence: lambda example: [(f"score {example.score:g}", example.sequence)],
    Ranking: lambda example: [(f"rank {place}", answer) for place, answer in enumerate(example.sequences, start=1)],
    LabelledSequence: lambda example: [
        ("desirable" if example.desirable else "undesirable", example.sequence),
        ("mismatched", example.mismatched),
    ],
    Prompt: lambda example: [("prompt", TokenSequence(example.tokens, (False,) * len(example.tokens)))],
}


def show(config: TrainConfig, roles: Roles, tokenizer: Any, example: object) -> None:
    """The settings, the roles' parameters, and the first example as the model will see it."""
    out = Console(highlight=False, markup=False)
    settings = {**asdict(config), "dry_run": False, "resume": False, "overwrite": False}
    out.print(yaml.safe_dump(settings, sort_keys=False), soft_wrap=True, end="")
    lines = [
        *(Text(escape_controls(line, keep="")) for line in parameter_lines(roles)),
        Text(),
        *example_lines(example, tokenizer, colour=out.is_terminal),
    ]
    for line in [Text(), *lines]:
        out.print(Text("# ").append_text(line), soft_wrap=True)


def count(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> int:
    """Number of elements. bitsandbytes packs two 4-bit elements into a byte and stores the shape apart."""
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in parameters]
    return sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)


def parameter_lines(roles: Roles) -> list[str]:
    """A line for each role: all parameters that it runs with, and how many of them are trained."""
    named = dict(roles.model.named_parameters())
    adapters = {name for name in roles.adapters.values() if name is not None}
    own = {name: [p for path, p in named.items() if f".{name}." in path] for name in adapters}
    base = [p for path, p in named.items() if not any(f".{name}." in path for name in adapters)]
    lines = []
    for role, adapter in roles.adapters.items():
        copied = list(roles.copies[role].parameters()) if role in roles.copies else base
        parts = copied + own.get(adapter or "", [])
        parts += list(roles.heads[role].parameters()) if role in roles.heads else []
        head = " and a scalar head" if role in roles.heads else ""
        trained = count([parameter for parameter in parts if parameter.requires_grad and role in roles.trained])
        lines.append(f"{role}: {weights_of(roles, role)}{head}, {count(parts):,} parameters, {trained:,} trained")
    return lines


def weights_of(roles: Roles, role: str) -> str:
    """A role's weights in words, without its head."""
    if role in roles.copies:
        return "a frozen copy"
    if roles.adapters[role] is None:
        return "base"
    return f"adapter of rank {roles.rank(role)}" if roles.has_own_weights(role) else f"the {roles.trained[0]}'s weights"


def example_lines(example: object, tokenizer: Any, *, colour: bool) -> Iterator[Text]:
    """Each sequence of an example, with a title."""
    for what, sequence in SEQUENCES[type(example)](example):
        learned = sum(sequence.response_mask)
        counts = f"{len(sequence)} tokens, {learned} of them the response" if learned else f"{len(sequence)} tokens"
        yield Text(escape_controls(f"{what}: {counts}", keep=""))
        yield marked(sequence, tokenizer, colour=colour)


def marked(sequence: TokenSequence, tokenizer: Any, *, colour: bool) -> Text:
    """The decoded tokens on one line, special ones too: the prompt dim and the response green, or in [[ ]]."""
    text = Text()
    pairs = zip(sequence.tokens, sequence.response_mask, strict=True)
    before: list[int] = []
    for response, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        piece = continuation_text(before, ids, tokenizer, skip_special_tokens=False)
        piece = escape_controls(piece, keep="")
        before += ids
        if colour:
            text.append(piece, style="bold green" if response else "dim")
        else:
            text.append(f"[[{piece}]]" if response else piece)
    return text
