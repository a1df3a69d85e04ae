"""Rollout: responses sampled from the model for prompts, each token with its log-probability.

    prompts, longest first -> rows of a decode batch -> a forward pass per token -> a finished row takes the next prompt

    decode_batch.py    the rows of one forward pass: left-padded batches, and rows without a cache
    cache_slots.py     continuous batching: each row of the cache has its own length
    cuda_graphs.py     CUDA graphs: the decoding step of cache_slots.py is captured once and replayed
    token_sampling.py  logits -> a token and its log-probability
    stop_tokens.py     stop tokens and stop strings, and the response's text without them
    sampler.py         the decoding loop

Of the model's own `generation_config`, only the EOS ids are used. Its top-k, top-p and repetition penalty are not: the
policy is sampled with onecard's own settings alone (`Sampling`). Masks, not token ids, mark the padding: a pad token
may be the EOS, the EOS may be the BOS, and all of them may occur inside a prompt. There is no beam search.
"""

from onecard.rollout.decode_batch import CachedBatch, DecodeBatch, PaddedBatch
from onecard.rollout.sampler import (
    Response,
    Rollout,
    decoding_modes,
    generate,
    make_decode_batch,
    make_episode,
    sample_responses,
    sampling_budget,
)
from onecard.rollout.stop_tokens import StopStrings, find_stop_tokens, stop_ids, text_before_end, tokens_before_end
from onecard.rollout.token_sampling import Sampling, logits_warpers, sample_token, uniforms_of

__all__ = [
    "CachedBatch",
    "DecodeBatch",
    "PaddedBatch",
    "Response",
    "Rollout",
    "Sampling",
    "StopStrings",
    "decoding_modes",
    "find_stop_tokens",
    "generate",
    "logits_warpers",
    "make_decode_batch",
    "make_episode",
    "sample_responses",
    "sample_token",
    "sampling_budget",
    "stop_ids",
    "text_before_end",
    "tokens_before_end",
    "uniforms_of",
]
