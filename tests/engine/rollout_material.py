"""What the tests of the sampling loop share: models with their prompts, and judges of what was drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.config import ModelConfig
from onecard.data.batches import TokenSequence, pack
from onecard.models.build import load_player
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Response, Sampling, end_tokens, sample_responses

TEXTS = [
    "Lily",
    "Once upon a time, there was a little girl named Sue. She",
    "The big dog ran to the park and",
    "One day, Tom and his mom went to the store to buy some red apples. Tom was",
    "Ben saw",
    "It was",
]


@dataclasses.dataclass(frozen=True)
class Player:
    """A model with its tokenizer and the prompts of `TEXTS`."""

    roles: Roles
    tokenizer: Any
    prompts: tuple[tuple[int, ...], ...]
    ends: frozenset[int]

    @property
    def model(self) -> Any:
        return self.roles.causal_model()

    def sample(self, sampling: Sampling, prompts: Sequence[Sequence[int]] | None = None, **changes: Any) -> Any:
        settings = {"stop_tokens": self.ends, "batch_size": 8, **changes}
        return sample_responses(self.roles, self.prompts if prompts is None else prompts, sampling, **settings)


def load(folder: Path, **settings: Any) -> Player:
    config = ModelConfig(model=str(folder), **settings)
    tokenizer, roles = load_tokenizer(config), load_player(config, role="policy")
    prompts = tuple(tuple(tokenizer.encode(text)) for text in TEXTS)
    return Player(roles, tokenizer, prompts, end_tokens(roles, tokenizer))


@contextmanager
def spied(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of every pass."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


@torch.no_grad()
def own_logprobs(player: Player, prompt: Sequence[int], response: Response, temperature: float) -> Tensor:
    """What the role itself says of a response, in one pass over the finished sequence."""
    mask = (False,) * len(prompt) + (True,) * len(response.tokens)
    batch = pack([TokenSequence((*prompt, *response.tokens), mask)])
    return player.roles.logprobs(batch, batch.targets, temperature=temperature)


@torch.no_grad()
def next_logits(player: Player, prompt: Sequence[int]) -> Tensor:
    return player.model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0, -1].float()


def greedy_by_transformers(player: Player, prompt: Sequence[int], length: int) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)])
    out = player.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
        eos_token_id=sorted(player.ends), pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, ids.shape[1] :].tolist())


def common_ends(player: Player) -> frozenset[int]:
    """EOS and every token with a full stop, so that responses end early and at several places."""
    return player.ends | {token for piece, token in player.tokenizer.get_vocab().items() if "." in piece}
