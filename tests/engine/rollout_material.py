"""Shared by the tests of the sampling loop: models with prompts, and expected tokens and log-probs."""

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
from onecard.models.build import load_frozen_role
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Response, Sampling, find_stop_tokens, sample_responses

TEXTS = [
    "Lily",
    "Once upon a time, there was a little girl named Sue. She",
    "The big dog ran to the park and",
    "One day, Tom and his mom went to the store to buy some red apples. Tom was",
    "Ben saw",
    "It was",
]


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A model with its tokenizer and the prompts of `TEXTS`."""

    roles: Roles
    tokenizer: Any
    prompts: tuple[tuple[int, ...], ...]
    stop_tokens: frozenset[int]

    @property
    def model(self) -> Any:
        return self.roles.causal_model()

    def sample(self, sampling: Sampling, prompts: Sequence[Sequence[int]] | None = None, **changes: Any) -> Any:
        settings = {"stop_tokens": self.stop_tokens, "batch_size": 8, **changes}
        return sample_responses(self.roles, self.prompts if prompts is None else prompts, sampling, **settings)


def load(folder: Path, **settings: Any) -> LoadedPolicy:
    config = ModelConfig(model=str(folder), **settings)
    tokenizer, roles = load_tokenizer(config), load_frozen_role(config, role="policy")
    prompts = tuple(tuple(tokenizer.encode(text)) for text in TEXTS)
    return LoadedPolicy(roles, tokenizer, prompts, find_stop_tokens(roles, tokenizer))


@contextmanager
def recorded_shapes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Record (rows, columns) of the input ids of every forward pass."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


@torch.no_grad()
def one_pass_logprobs(policy: LoadedPolicy, prompt: Sequence[int], response: Response, temperature: float) -> Tensor:
    """Log-probs of a response in one pass over the finished sequence."""
    mask = (False,) * len(prompt) + (True,) * len(response.tokens)
    batch = pack([TokenSequence((*prompt, *response.tokens), mask)])
    return policy.roles.logprobs(batch, batch.targets, temperature=temperature)


@torch.no_grad()
def next_logits(policy: LoadedPolicy, prompt: Sequence[int]) -> Tensor:
    return policy.model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0, -1].float()


def greedy_by_transformers(policy: LoadedPolicy, prompt: Sequence[int], length: int) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)])
    out = policy.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
        eos_token_id=sorted(policy.stop_tokens), pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, ids.shape[1] :].tolist())


def frequent_stop_tokens(policy: LoadedPolicy) -> frozenset[int]:
    """EOS and every token with a full stop: responses end early, at different lengths."""
    return policy.stop_tokens | {token for piece, token in policy.tokenizer.get_vocab().items() if "." in piece}
