"""Supervised fine-tuning: the mean negative log-likelihood of the response tokens.

    loss = -1/N sum_t log pi(y_t | y_<t),   N: all response tokens of the optimizer step

Left out: packing several texts into one fixed-length sequence (sequences are packed end to end with their own attention
instead), and NEFTune.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onecard.algorithms.common import load_examples, longest_sequence, run_task
from onecard.batches import TokenBatch, TokenSequence, pack, predicted_tokens, response_targets
from onecard.config import SFTConfig
from onecard.data import sft_examples
from onecard.models.build import load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.runs import open_run, with_folder
from onecard.trainer import Task
from onecard_kernels import Loss


def sft_loss(roles: Roles, batch: TokenBatch, normalizer: int) -> Loss:
    """Negative log-likelihood of the response tokens / `normalizer`."""
    logprobs = roles.logprobs(batch, response_targets(batch))
    return Loss(-logprobs.sum() / normalizer, {})


def count_tokens(sequences: Sequence[TokenSequence]) -> int:
    """The normaliser: response tokens that something predicts."""
    return sum(predicted_tokens(sequence) for sequence in sequences)


def run(config: SFTConfig) -> Path:
    """`onecard sft`. Returns the folder of the trained policy."""
    config = with_folder(config, "sft")
    run = open_run(config)
    tokenizer = load_tokenizer(config)
    max_length = longest_sequence(config)
    training, heldout = load_examples(
        config,
        lambda rows: sft_examples(
            rows,
            tokenizer,
            max_length=max_length,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
            skip_bad_rows=config.skip_bad_rows,
        ),
    )
    roles = load_roles(config, trained="policy")
    task = Task(
        name="sft",
        train=training,
        heldout=heldout,
        collate=pack,
        count=count_tokens,
        tokens=len,
        loss=lambda batch, normalizer: sft_loss(roles, batch, normalizer),
    )
    return run_task(config, task, roles, tokenizer, run)
