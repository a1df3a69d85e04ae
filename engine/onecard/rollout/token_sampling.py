"""Logits -> a token of each row, and the log-probability that it was drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.utils.rng import seed_of

BLOCK = 256  # words; near the root of large vocabularies, so both of the searches are short
NOT_FINITE = -1  # the token of a row whose logits are not finite


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 takes the likeliest one; `top_k` 0 and `top_p` 1 leave all of them in."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def logits_warpers(sampling: Sampling) -> list[Any]:
    """transformers' top-k and top-p, in its order."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    top_k = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
    top_p = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return [*top_k, *top_p]


def sample_token(
    logits: Tensor, sampling: Sampling, filters: Sequence[Any], uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token for each row of logits [b, V], and its log-probability: int64 [b], fp32 [b].

    The token is the first up to which the probabilities add up to more than the row's chance, a number from 0 to below
    1: `uniforms` [b], or torch's global generator's. A row whose logits are not finite gets the token NOT_FINITE: one
    bad logit makes the whole row nan, and to look here would make the host wait for a GPU.
    """
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    for only_top in filters:
        logits = only_top(None, logits)
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1, keepdim=True)
        found = logprobs.gather(1, tokens)
    else:
        if uniforms is None:
            uniforms = torch.rand(len(logits), device=logits.device)
        probs = logits.softmax(-1)
        tokens = first_beyond(probs, uniforms)
        found = probs.gather(1, tokens).log()
    tokens = tokens.masked_fill(found.isnan(), NOT_FINITE)
    return tokens.squeeze(1), found.squeeze(1)


def first_beyond(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Of each row, the first place up to which `probs` [b, V] add up to more than the row's share of their sum: [b, 1].

    One reading of the probabilities: sums of blocks of words, then the words of one block. `torch.multinomial` draws a
    number for every word, most of the time of a rollout on a CPU. In float64, in which a chance times the sum stays
    below the sum; a word of probability 0 is never found.
    """
    words = probs.shape[1]
    full = words // BLOCK
    blocks = probs[:, : full * BLOCK].unflatten(1, (full, BLOCK)).sum(-1, dtype=torch.float64)
    rest = probs[:, full * BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)
    sums = torch.cat([blocks, rest], dim=1).cumsum(-1)
    wanted = uniforms.double().unsqueeze(1) * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True).clamp(max=full)
    before = sums.gather(1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    places = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(1, places.clamp(max=words - 1)).double().masked_fill(places >= words, 0.0).cumsum(-1)
    # The block's words may add up to a little less than its sum did
    wanted = torch.minimum(wanted - before, inside[:, -1:] * (1 - 2.0**-52))
    place = torch.searchsorted(inside, wanted, right=True)
    return (block * BLOCK + place).clamp(max=words - 1)


def uniforms_of(seed: int, prompt: int, length: int) -> Tensor:
    """The numbers that choose the tokens of one prompt's response, fp32 [length], whatever else is sampled with it."""
    generator = torch.Generator().manual_seed(seed_of(seed, prompt))
    return torch.rand(length, generator=generator)
