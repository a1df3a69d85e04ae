"""Dataset kinds of reward training: pairs, scores, rankings. The columns of a row decide its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onecard.algorithms.common import pair_tokenizer
from onecard.algorithms.reward.agreement import agreement
from onecard.algorithms.reward.losses import bradley_terry_loss, ranking_loss, regression_loss
from onecard.config import RewardConfig
from onecard.config.base import raise_first
from onecard.data import Row, Rows, Tokenized, ranking_examples, scored_examples
from onecard.data.batches import (
    PreferenceBatch,
    PreferencePair,
    Ranking,
    RankingBatch,
    ScoredBatch,
    ScoredSequence,
    pack_pairs,
    pack_rankings,
    pack_scored,
    size_when_sharing,
)
from onecard.data.columns import columns_present, has
from onecard.data.files import with_check
from onecard.models.roles import Roles
from onecard.utils.errors import OnecardError, nearest
from onecard_kernels import Loss


@dataclass(frozen=True)
class Kind:
    """A dataset kind, recognised by `columns`. `example_type` and `batch_type`: classes of its examples and batches.

    `loss(scores, batch, config, normalizer)`. `summary(scores, batch)`: evaluation metrics that need the scores of all
    held-out rows at once. `shares_prompts`: an example has several responses to one prompt, and `collate` has the
    argument `share_prompts`.
    """

    name: str
    columns: tuple[str, ...]
    example_type: type
    batch_type: type
    tokenize: Callable[[Iterable[Row], Any, int, RewardConfig], Tokenized[Any]]
    collate: Callable[..., Any]
    loss: Callable[[Tensor, Any, RewardConfig, int], Loss]
    summary: Callable[[Tensor, Any], dict[str, float]] = lambda scores, batch: {}
    shares_prompts: bool = True


def tokenize_pairs(rows: Iterable[Row], tokenizer: Any, max_length: int, config: RewardConfig) -> Tokenized[Any]:
    return pair_tokenizer(config)(rows, tokenizer, max_length)


def tokenize_scores(rows: Iterable[Row], tokenizer: Any, max_length: int, config: RewardConfig) -> Tokenized[Any]:
    return scored_examples(
        rows,
        tokenizer,
        max_length=max_length,
        truncation_mode=config.truncation_mode,
        skip_bad_rows=config.skip_bad_rows,
        bounds=(0.0, 1.0) if config.score_activation == "sigmoid" else None,
    )


def tokenize_rankings(rows: Iterable[Row], tokenizer: Any, max_length: int, config: RewardConfig) -> Tokenized[Any]:
    return ranking_examples(
        rows,
        tokenizer,
        max_length=max_length,
        truncation_mode=config.truncation_mode,
        skip_bad_rows=config.skip_bad_rows,
    )


def pairs_loss(scores: Tensor, batch: PreferenceBatch, config: RewardConfig, normalizer: int) -> Loss:
    chosen, rejected = scores.chunk(2)
    return bradley_terry_loss(
        chosen,
        rejected,
        batch.margins,
        center_rewards_coefficient=config.center_rewards_coefficient,
        normalizer=normalizer,
    )


def scores_loss(scores: Tensor, batch: ScoredBatch, config: RewardConfig, normalizer: int) -> Loss:
    return regression_loss(scores, batch.scores, normalizer=normalizer)


def rankings_loss(scores: Tensor, batch: RankingBatch, config: RewardConfig, normalizer: int) -> Loss:
    return ranking_loss(
        scores,
        batch.counts,
        center_rewards_coefficient=config.center_rewards_coefficient,
        normalizer=normalizer,
    )


KINDS = (
    Kind("pairs", ("chosen", "rejected"), PreferencePair, PreferenceBatch, tokenize_pairs, pack_pairs, pairs_loss),
    Kind(
        "scores", ("completion", "score"), ScoredSequence, ScoredBatch, tokenize_scores, pack_scored, scores_loss,
        summary=lambda scores, batch: agreement(scores, batch.scores), shares_prompts=False,
    ),
    Kind("rankings", ("completions",), Ranking, RankingBatch, tokenize_rankings, pack_rankings, rankings_loss),
)  # fmt: skip
KIND_OF_EXAMPLE = {kind.example_type: kind for kind in KINDS}
KIND_OF_BATCH = {kind.batch_type: kind for kind in KINDS}


def collate(examples: Sequence[Any]) -> Any:
    """A batch of examples, which are all of one kind."""
    return KIND_OF_EXAMPLE[type(examples[0])].collate(examples)


def collate_shared(examples: Sequence[Any]) -> Any:
    """`collate`, with the prompt of several responses only once in the batch."""
    kind = KIND_OF_EXAMPLE[type(examples[0])]
    return kind.collate(examples, share_prompts=True) if kind.shares_prompts else kind.collate(examples)


def example_size(example: Any) -> int:
    """Tokens of an example in a batch of `collate_shared`."""
    return size_when_sharing(example) if KIND_OF_EXAMPLE[type(example)].shares_prompts else len(example)


def loss_from_scores(scores: Tensor, batch: Any, config: RewardConfig, normalizer: int) -> Loss:
    """Loss and metrics of a batch's scores."""
    loss = KIND_OF_BATCH[type(batch)].loss(scores, batch, config, normalizer)
    extremes = {"min_reward": scores.detach().min(), "max_reward": scores.detach().max()}
    return Loss(loss.loss, {**loss.metrics, **extremes})


def reward_loss(roles: Roles, batch: Any, config: RewardConfig, normalizer: int) -> Loss:
    """Score all responses of a batch, and compute its loss."""
    return loss_from_scores(roles.scores(batch.sequences), batch, config, normalizer)


def kind_of(row: Row) -> Kind | None:
    """The first kind whose columns are all in the row, else the first with any column in it, else None."""
    for matches in (all, any):
        for kind in KINDS:
            if matches(has(row.values, column) for column in kind.columns):
                return kind
    return None


def detect_kind(rows: Iterable[Row]) -> tuple[Kind, Rows]:
    """Detect the kind of a dataset. Returns the kind and the rows; reading a row of another kind raises.

    A row with no column of any kind is passed through: the tokenizer of the detected kind reports it as a bad row.
    """
    first, kind = next(((row, kind) for row in rows if (kind := kind_of(row)) is not None), (None, None))
    if first is None or kind is None:
        first = next(iter(rows))
        known = ", or ".join(" + ".join(f"'{column}'" for column in kind.columns) for kind in KINDS)
        names = [str(name) for name in first.values if has(first.values, name)]
        near = next(filter(None, (nearest(column, names) for kind in KINDS for column in kind.columns)), "")
        raise OnecardError(f"{first}: no column {known}; {columns_present(first.values)}{near}")
    first_row, expected = str(first), kind

    def check(row: Row) -> None:
        row_kind = kind_of(row)
        if row_kind not in (None, expected):
            raise OnecardError(
                f"{row}: a row of {row_kind.name}, but {first_row} is a row of {expected.name}; expected one kind of "
                "rows in a dataset."
            )

    return expected, with_check(rows, check)


def tokenize(rows: Iterable[Row], tokenizer: Any, max_length: int, config: RewardConfig) -> Tokenized[Any]:
    """Detect the kind of the rows, and tokenize them."""
    kind, rows = detect_kind(rows)
    return kind.tokenize(rows, tokenizer, max_length, config)


def check_settings(examples: Sequence[Any], config: RewardConfig) -> None:
    """Raise for a setting that the training examples' kind does not use. Held-out rows may be of any kind."""
    kind = KIND_OF_EXAMPLE[type(examples[0])]
    but = f"but {config.dataset} has {kind.name}."
    raise_first({
        f"score_activation: sigmoid is for rows with scores, {but}": (
            config.score_activation == "sigmoid" and kind.name != "scores"
        ),
        f"center_rewards_coefficient: {config.center_rewards_coefficient:g} is for pairs and rankings, {but}": (
            config.center_rewards_coefficient > 0 and kind.name == "scores"
        ),
    })  # fmt: skip
