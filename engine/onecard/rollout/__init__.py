"""Prompts -> responses, sampled from the model itself: each token with the log-probability it was drawn with.

    prompts, longest first -> rows of a cache -> a pass for each token -> where a row ends, the next prompt comes in

    held.py       the rows that the model runs on, for models of any kind: batches, padded on the left
    slots.py      the same where a row can be told its own length: a row that ended takes the next prompt
    replay.py     such a row's pass, recorded once on a GPU and replayed
    drawing.py    logits -> a token and its log-probability
    ends.py       what ends a response, and its text without that
    sampler.py    the loop

The model's own `generation_config` (top-k, top-p, repetition penalty) is not used, but for the ids that end a response:
what is sampled is the policy, at the temperature that was asked for. Masks, never ids, say what is padding: a pad token
may be the EOS, the EOS may be the BOS, and all of them may stand inside a prompt. There is no beam search.
"""

from onecard.rollout.decode_batch import DecodeBatch, PaddedBatch, UncachedBatch
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
from onecard.rollout.stop_tokens import StopStrings, end_tokens, stop_ids, text_before_end, tokens_before_end
from onecard.rollout.token_sampling import Sampling, logits_warpers, sample_token, uniforms_of

__all__ = [
    "DecodeBatch",
    "PaddedBatch",
    "Response",
    "Rollout",
    "Sampling",
    "StopStrings",
    "UncachedBatch",
    "decoding_modes",
    "end_tokens",
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
