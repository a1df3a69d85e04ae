"""Sample a token for each row of logits, with its log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.utils.rng import seed_of

BLOCK = 256  # vocabulary entries; about the square root of a large vocabulary, so both searches are short
NOT_FINITE = -1  # the token of a row whose logits are not finite


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def logits_warpers(sampling: Sampling) -> list[Any]:
    """transformers' top-k and top-p warpers, in its order; none at temperature 0."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    top_k = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
    top_p = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return [*top_k, *top_p]


def sample_token(
    logits: Tensor, sampling: Sampling, warpers: Sequence[Any], uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token for each row of logits [b, V]: tokens int64 [b], and their log-probabilities fp32 [b].

    The token is the first whose cumulative probability is more than the row's uniform in [0, 1): `uniforms` [b], or
    drawn from torch's global generator. A row whose logits are not finite gets the token NOT_FINITE. It raises no error
    here, because a check would make the host wait for the GPU.
    """
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    for warper in warpers:
        logits = warper(None, logits)
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1, keepdim=True)
        chosen = logprobs.gather(1, tokens)
    else:
        if uniforms is None:
            uniforms = torch.rand(len(logits), device=logits.device)
        probs = logits.softmax(-1)
        tokens = search_cumulative(probs, uniforms)
        chosen = probs.gather(1, tokens).log()
    tokens = tokens.masked_fill(chosen.isnan(), NOT_FINITE)  # one NaN or +inf logit makes the whole row NaN
    return tokens.squeeze(1), chosen.squeeze(1)


def search_cumulative(probs: Tensor, uniforms: Tensor) -> Tensor:
    """For each row, the first token whose cumulative `probs` [b, V] exceed `uniforms` [b] * their sum: int64 [b, 1].

    The sums of blocks of BLOCK entries are searched first, then the entries of one block. `torch.multinomial` draws a
    random number for every vocabulary entry instead, which takes most of a rollout's time on a CPU. Sums are float64,
    in which uniform * sum stays below the sum. A token of probability 0 is never returned.
    """
    vocab = probs.shape[1]
    full = vocab // BLOCK
    blocks = probs[:, : full * BLOCK].unflatten(1, (full, BLOCK)).sum(-1, dtype=torch.float64)
    rest = probs[:, full * BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)
    sums = torch.cat([blocks, rest], dim=1).cumsum(-1)
    target = uniforms.double().unsqueeze(1) * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp(max=full)
    before = sums.gather(1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    indices = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(1, indices.clamp(max=vocab - 1)).double().masked_fill(indices >= vocab, 0.0).cumsum(-1)
    # The cumulative sum within a block may end slightly below the block's sum.
    target = torch.minimum(target - before, inside[:, -1:] * (1 - 2.0**-52))
    offset = torch.searchsorted(inside, target, right=True)
    return (block * BLOCK + offset).clamp(max=vocab - 1)


def uniforms_of(seed: int, prompt: int, length: int) -> Tensor:
    """The uniform random numbers of one prompt's response, fp32 [length], in [0, 1).

    They depend only on `seed` and the prompt's index, not on the prompts sampled with it.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, prompt))
    return torch.rand(length, generator=generator)
