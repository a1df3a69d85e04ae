"""Supervised fine-tuning: the mean negative log-likelihood of the response tokens.

    loss = -1/N sum_t log pi(y_t | y_<t),   N: all response tokens of the optimizer step

Not implemented: several texts in one fixed-length sequence (sequences are packed end to end, each with its own
attention, instead), and NEFTune.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onecard.algorithms.common import Recipe, run_recipe
from onecard.config import SFTConfig
from onecard.data import Row, Tokenized, sft_examples
from onecard.data.batches import TokenBatch, TokenSequence, pack, predicted_tokens
from onecard.models.roles import Roles
from onecard_kernels import Loss


def sft_loss(roles: Roles, batch: TokenBatch, normalizer: int) -> Loss:
    """Negative log-likelihood of the response tokens / `normalizer`."""
    logprobs = roles.logprobs(batch, batch.targets)
    return Loss(-logprobs.sum() / normalizer, {})


def count_tokens(sequences: Sequence[TokenSequence]) -> int:
    """The normaliser: response tokens. A first token of a sequence is not counted, because nothing predicts it."""
    return sum(predicted_tokens(sequence) for sequence in sequences)


def make_recipe(config: SFTConfig) -> Recipe[TokenSequence, TokenBatch]:
    """The recipe of an SFT run."""

    def tokenize(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Tokenized[TokenSequence]:
        return sft_examples(
            rows,
            tokenizer,
            max_length=max_length,
            truncation_mode=config.truncation_mode,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
            skip_bad_rows=config.skip_bad_rows,
        )

    return Recipe(command="sft", trained="policy", tokenize=tokenize, collate=pack, count=count_tokens, loss=sft_loss)


def run(config: SFTConfig) -> Path:
    """`onecard sft`. Returns the folder of the trained policy."""
    config.validate()
    return run_recipe(config, make_recipe(config))
