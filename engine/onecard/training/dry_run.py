"""`--dry_run`: print what a training command would train, to standard output; write and train nothing.

The output is YAML that `--config` accepts: the settings, and the rest as comments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from onecard.utils.errors import visible

TitledSequences = list[tuple[str, TokenSequence]]

# type of an example -> its sequences with their titles
SEQUENCES: dict[type, Callable[[Any], TitledSequences]] = {
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
    """Print the settings, the roles' parameters, and an example's tokens as text."""
    out = Console(highlight=False, markup=False)
    settings = {**asdict(config), "dry_run": False, "resume": False, "overwrite": False}
    out.print(yaml.safe_dump(settings, sort_keys=False), soft_wrap=True, end="")
    lines = [
        *(Text(visible(line, kept="")) for line in parameter_lines(roles)),
        Text(),
        *example_lines(example, tokenizer, colour=out.is_terminal),
    ]
    for line in [Text(), *lines]:
        out.print(Text("# ").append_text(line), soft_wrap=True)


def num_elements(parameters: Sequence[nn.Parameter]) -> int:
    """Number of elements. Of a 4-bit parameter bitsandbytes has the shape in `quant_state`: a byte has two elements."""
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in parameters]
    return sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)


def parameter_lines(roles: Roles) -> list[str]:
    """A line for each role: the number of parameters that it uses, and how many of them are trained."""
    named = dict(roles.model.named_parameters())
    adapters = {name for name in roles.adapters.values() if name is not None}
    own = {name: [p for path, p in named.items() if f".{name}." in path] for name in adapters}
    base = [p for path, p in named.items() if not any(f".{name}." in path for name in adapters)]
    lines = []
    for role, adapter in roles.adapters.items():
        body = list(roles.copies[role].parameters()) if role in roles.copies else base
        parts = body + own.get(adapter or "", [])
        parts += list(roles.heads[role].parameters()) if role in roles.heads else []
        head = " and a scalar head" if role in roles.heads else ""
        trained = num_elements([parameter for parameter in parts if parameter.requires_grad and role in roles.trained])
        total = num_elements(parts)
        lines.append(f"{role}: {weights_of(roles, role)}{head}, {total:,} parameters, {trained:,} trained")
    return lines


def weights_of(roles: Roles, role: str) -> str:
    """A role's weights in words, without its head."""
    if role in roles.copies:
        return "a frozen copy"
    if roles.adapters[role] is None:
        return "base"
    return f"adapter of rank {roles.rank(role)}" if roles.has_own_weights(role) else f"the {roles.trained[0]}'s weights"


def example_lines(example: object, tokenizer: Any, *, colour: bool) -> Iterator[Text]:
    """For each sequence of an example: a line with its title and lengths, and a line with its tokens."""
    for title, sequence in SEQUENCES[type(example)](example):
        in_response = sum(sequence.response_mask)
        counts = f"{len(sequence)} tokens" + (f", {in_response} of them the response" if in_response else "")
        yield Text(visible(f"{title}: {counts}", kept=""))
        yield marked(sequence, tokenizer, colour=colour)


def marked(sequence: TokenSequence, tokenizer: Any, *, colour: bool) -> Text:
    """The tokens as text on one line, special tokens included. The response is green, or without `colour` in [[ ]]."""
    text = Text()
    pairs = zip(sequence.tokens, sequence.response_mask, strict=True)
    before: list[int] = []
    for response, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        piece = continuation_text(before, ids, tokenizer, skip_special_tokens=False)
        piece = visible(piece, kept="")
        before += ids
        if colour:
            text.append(piece, style="bold green" if response else "dim")
        else:
            text.append(f"[[{piece}]]" if response else piece)
    return text
