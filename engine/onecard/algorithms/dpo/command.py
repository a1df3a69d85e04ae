"""`onecard dpo`: settings -> a trained policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from onecard.algorithms.common import Collation, Recipe, pair_tokenizer, run_recipe
from onecard.algorithms.dpo.losses import preference_loss
from onecard.algorithms.dpo.reference import with_ref_logps
from onecard.algorithms.dpo.variants import Variant, loss_keywords, pick_variant
from onecard.config import DPOConfig
from onecard.data import Row, Tokenized, labelled_examples
from onecard.data.batches import LabelledSequence, pack_labelled, pack_pairs, size_when_sharing
from onecard.data.example_arrays import all_numbers
from onecard.models.build import reference_adapter
from onecard.models.roles import Roles
from onecard_kernels.dpo import WHOLE_BATCH

Collate = Callable[[Sequence[Any]], Any]  # of pairs, or of labelled answers
Prepare = Callable[[Roles, Sequence[Any], Sequence[Any]], tuple[Sequence[Any], Sequence[Any]]]

# KTO's paper, eq. 8: all desirable answers together weigh 1 to 4/3 times as much as all undesirable ones
MAX_WEIGHT_RATIO = 4 / 3


def balance_notes(examples: Sequence[LabelledSequence], config: DPOConfig) -> tuple[str, ...]:
    """A note if the weights are outside the range that KTO's paper advises for these numbers of answers."""
    desirable = int(sum(label for (label,) in all_numbers(examples)))
    undesirable = len(examples) - desirable
    if not (desirable and undesirable and config.undesirable_weight):
        return ()
    count_ratio = desirable / undesirable
    weight_ratio = config.desirable_weight * count_ratio / config.undesirable_weight
    if 1 <= round(weight_ratio, 2) <= MAX_WEIGHT_RATIO:  # rounded: a few answers too many need no note
        return ()
    least, most = (config.undesirable_weight * bound / count_ratio for bound in (1, MAX_WEIGHT_RATIO))
    return (
        f"{desirable} desirable and {undesirable} undesirable answers: KTO's paper advises a desirable_weight of "
        f"{least:.3g} to {most:.3g} here (it is {config.desirable_weight:g}).",
    )


def labelled_tokenizer(config: DPOConfig) -> Callable[[Iterable[Row], Any, int], Tokenized[LabelledSequence]]:
    """`Recipe.tokenize` for labelled answers. Only kto uses mismatched ones (another row's answer to a prompt)."""

    def tokenize(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Tokenized[LabelledSequence]:
        tokenized = labelled_examples(
            rows,
            tokenizer,
            max_length=max_length,
            truncation_mode=config.truncation_mode,
            skip_bad_rows=config.skip_bad_rows,
            mismatched=config.loss_type == ["kto"],
        )
        return replace(tokenized, notes=(*tokenized.notes, *balance_notes(tokenized.examples, config)))

    return tokenize


def make_recipe(config: DPOConfig) -> Recipe[Any, Any]:
    """The recipe of a DPO run with its `loss_type`. Raises if settings contradict each other."""
    keywords = loss_keywords(config)
    variant = pick_variant(config)
    reference_adapter(config)  # raises for a ref_adapter that cannot be used
    loss = partial(preference_loss, use_weighting=True) if config.use_weighting else variant.loss
    collate: Collate = pack_labelled if variant.labelled else pack_pairs
    shares = config.share_prompts and not variant.labelled
    return Recipe(
        command="dpo",
        trained="policy",
        tokenize=labelled_tokenizer(config) if variant.labelled else pair_tokenizer(config),
        collate=collate,
        count=len,
        loss=lambda roles, batch, normalizer: loss(roles, batch, keywords, normalizer),
        reference=variant.compute_ref_logps is not None,
        prepare=reference_pass(config, variant, collate) if config.precompute_ref_log_probs else None,
        prompt_sharing_collation=Collation(partial(pack_pairs, share_prompts=True), size_when_sharing)
        if shares
        else None,
        unsplittable_loss=next((f"loss_type {name}" for name in config.loss_type if name in WHOLE_BATCH), ""),
    )


def reference_pass(config: DPOConfig, variant: Variant, collate: Collate) -> Prepare:
    """`Recipe.prepare` that computes the reference's log-probs, and then frees a reference that is a copy."""
    compute = variant.compute_ref_logps
    assert compute is not None

    def prepare(roles: Roles, training: Sequence[Any], heldout: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        training, heldout = (
            with_ref_logps(config, roles, examples, collate, compute) for examples in (training, heldout)
        )
        if "reference" in roles.copies:
            del roles.copies["reference"], roles.adapters["reference"]
        return training, heldout

    return prepare


def run(config: DPOConfig) -> Path:
    """`onecard dpo`. Returns the folder of the trained policy."""
    config.validate()
    return run_recipe(config, make_recipe(config))
