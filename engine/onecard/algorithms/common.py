"""The steps that SFT, reward and DPO runs share (`run_recipe`), and what differs between them (`Recipe`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from onecard import reporting
from onecard.algorithms.samples import HeldoutSamples, heldout_samples
from onecard.algorithms.supervised import Supervised
from onecard.config import EvaluateConfig, PolicyTrainConfig, TrainConfig
from onecard.config.base import NO_DATASET
from onecard.data import Row, Tokenized, hold_out, open_rows, preference_examples
from onecard.data.batches import LabelledSequence, PreferencePair, TokenSequence
from onecard.data.example_arrays import all_lengths, all_tokens, lengths_of
from onecard.data.templates import template_date
from onecard.models.build import load_roles
from onecard.models.load import context_length, find_source, load_tokenizer
from onecard.models.memory_options import head_chunks, memory_option_notes
from onecard.models.micro_batching import TokenBudget
from onecard.models.roles import Roles
from onecard.models.vocabulary import check_tokens
from onecard.training import dry_run, run_folder
from onecard.training.identity import supervised_identity
from onecard.training.run_folder import Run, open_run, with_output_dir
from onecard.training.startup import check_decoding, check_model
from onecard.training.trainer import Objective, Trainer
from onecard.utils.errors import OnecardError
from onecard.utils.progress import Bar, say
from onecard_kernels import Loss

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

E = TypeVar("E", TokenSequence, PreferencePair, LabelledSequence)  # one example
P = TypeVar("P")  # an example, or a prompt
B = TypeVar("B", bound="DataclassInstance")  # a record of several


@dataclass(frozen=True)
class Sharing(Generic[E, B]):
    """Collate examples so that a prompt is run once for all its responses; `size` is the tokens of an example then."""

    collate: Callable[[Sequence[E]], B]
    size: Callable[[E], int] = len


def padded_rows(lengths: Sequence[int]) -> int:
    """Tokens of texts padded to the longest. Empty texts take none."""
    return sum(length > 0 for length in lengths) * max(lengths)


def check_start(
    config: TrainConfig,
    roles: Roles,
    training: Sequence[object],
    heldout: Sequence[object],
    samples: HeldoutSamples | None,
) -> None:
    """Startup checks of the model, on texts as long as the run's longest."""
    lengths = [*all_lengths(training), *all_lengths(heldout)]
    longest, together = max(map(max, lengths)), max(map(sum, lengths))
    items = max(config.per_device_train_batch_size, config.per_device_eval_batch_size)
    check_model(roles, longest, row=max(config.micro_batch_tokens or items * together, together))
    if samples is not None:
        check_decoding(roles, samples.longest)


@dataclass(frozen=True)
class Recipe(Generic[E, B]):
    """What differs between SFT, reward and DPO runs.

    rows -> `tokenize(rows, tokenizer, max_length)` -> examples -> `collate` -> batch -> `loss(roles, batch, n)`,
    where n, the normaliser, is `count` of the whole step's examples. `trained` is the role whose weights change.
    """

    command: str
    trained: str
    tokenize: Callable[[Iterable[Row], Any, int], Tokenized[E]]
    collate: Callable[[Sequence[E]], B]
    count: Callable[[Sequence[E]], int]
    loss: Callable[[Roles, B, int], Loss]
    reference: bool = False  # a frozen reference beside the trained role
    scalar: bool = False  # a scalar head on the trained role
    # metrics of the held-out examples, where they are not sums over micro-batches
    heldout: Callable[[Roles, Sequence[E], TokenBudget, Bar], dict[str, float]] | None = None
    adjust: Callable[[Roles, Sequence[E]], None] | None = None  # changes the trained weights before they are exported
    check: Callable[[Sequence[E]], None] | None = None  # raises if the settings do not fit the training examples
    prepare: Callable[[Roles, Sequence[E], Sequence[E]], tuple[Sequence[E], Sequence[E]]] | None = (
        None  # runs before step 0
    )
    sharing: Sharing[E, B] | None = None  # for models that pack
    unsplittable: str = ""  # `Objective.unsplittable`

    def objective(self, roles: Roles) -> Objective[E, B]:
        """What a step minimises. Prompts are shared if the model runs packed batches."""
        plain = Sharing(
            self.collate, (lambda example: padded_rows(lengths_of(example))) if roles.layout == "padded" else len
        )
        packing = self.sharing if self.sharing and roles.layout == "packed" else plain
        return Objective(
            packing.collate,
            self.count,
            lambda batch, normalizer: (self.loss(roles, batch, normalizer),),
            packing.size,
            self.unsplittable,
        )


def pair_tokenizer(config: TrainConfig) -> Callable[[Iterable[Row], Any, int], Tokenized[PreferencePair]]:
    """`Recipe.tokenize` of the commands that learn from pairs."""

    def tokenize(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Tokenized[PreferencePair]:
        return preference_examples(
            rows,
            tokenizer,
            max_length=max_length,
            truncation_mode=config.truncation_mode,
            skip_bad_rows=config.skip_bad_rows,
        )

    return tokenize


def longest_sequence(config: TrainConfig | EvaluateConfig) -> int:
    """`max_length`, or the model's context length if that is less."""
    limit = context_length(config)
    if limit is None or config.max_length <= limit:
        return config.max_length
    say(f"max_length: {limit} instead of {config.max_length}: the model's context has no more.")
    return limit


def load_examples(
    config: TrainConfig, tokenize: Callable[[Iterable[Row]], Tokenized[P]]
) -> tuple[Sequence[P], Sequence[P]]:
    """Training and held-out examples. Prints how many were cut, skipped or unusual."""
    if not config.dataset:
        raise OnecardError(NO_DATASET)
    parts = [tokenize(open_rows(config.dataset, split=config.dataset_train_split))]
    if config.eval_dataset:
        parts.append(tokenize(open_rows(config.eval_dataset, split=config.dataset_test_split)))
        training, heldout = parts[0].examples, parts[1].examples
    else:
        training, heldout = hold_out(parts[0].examples, parts[0].groups, test_size=config.test_size, seed=config.seed)
    for part in parts:
        for note in part.notes:
            say(f"data: {note}")
    say(f"data: {len(training)} examples to train on, {len(heldout)} held out.")
    return training, heldout


def export_and_report(roles: Roles, tokenizer: Any, run: Run) -> Path:
    """Export the (first) trained role, write the report, and print where they are."""
    role = roles.trained[0]
    exported = run.folder / role
    run_folder.write_folder(run.folder, role, lambda folder: roles.export(role, folder, tokenizer))
    written = reporting.write_run_report(run.folder)
    say(f"weights: {exported}    metrics: {run.folder / run_folder.METRICS}    plots: {written}")
    return exported


def describe_adapter(roles: Roles, role: str, source: Path | None) -> str:
    """A trained role in words. An adapter that training continues has its own rank, not lora_r."""
    if source is not None:
        return f"an adapter of rank {roles.rank(role)}, as it is in {source}"
    without = f", without {' and '.join(roles.left_out)}" if roles.left_out else ""
    return f"an adapter of rank {roles.rank(role)} on {roles.num_adapted_layers(role)} layers{without}"


def run_recipe(config: TrainConfig, recipe: Recipe[E, B]) -> Path:
    """A training command from valid settings to its exported weights. Nothing is written before all of it is loaded."""
    config = with_output_dir(config, recipe.command)
    run = open_run(config)
    with head_chunks(config.head_chunk_tokens), template_date(run.date):
        tokenizer = load_tokenizer(config)
        max_length = longest_sequence(config)
        training: Sequence[E]
        heldout: Sequence[E]
        training, heldout = load_examples(config, lambda rows: recipe.tokenize(rows, tokenizer, max_length))
        if recipe.check:
            recipe.check(training)
        roles, samples = load_and_check(config, recipe, tokenizer, training, heldout)
        if config.dry_run:
            dry_run.show(config, roles, tokenizer, training[0])
            return run.folder
        identity = supervised_identity(config, recipe.command, training, heldout)
        if recipe.prepare:
            training, heldout = recipe.prepare(roles, training, heldout)
        row = partial(recipe.heldout, roles, heldout) if recipe.heldout else None
        job = Supervised(config, recipe.command, recipe.objective(roles), training, heldout, samples, row)
        with run_folder.locked(run):
            Trainer(config, job, roles, run).train(identity)
            if recipe.adjust:
                recipe.adjust(roles, training)
            return export_and_report(roles, tokenizer, run)


def load_and_check(
    config: TrainConfig, recipe: Recipe[E, B], tokenizer: Any, training: Sequence[E], heldout: Sequence[E]
) -> tuple[Roles, HeldoutSamples | None]:
    """The run's weights, checked on texts as long as its longest, and the prompts that are answered at evaluations."""
    roles = load_roles(config, trained=recipe.trained, reference=recipe.reference, scalar=recipe.scalar)
    check_tokens(roles.causal_model(), tokenizer, [*all_tokens(training), *all_tokens(heldout)])
    samples = heldout_samples(config, roles, tokenizer, heldout) if isinstance(config, PolicyTrainConfig) else None
    check_start(config, roles, training, heldout, samples)
    trained = sum(parameter.numel() for parameter in roles.trained_parameters().values())
    if config.use_peft:
        say(f"{recipe.trained}: {describe_adapter(roles, recipe.trained, find_source(config.model).adapter)}.")
    say(f"model: {trained:,} trained parameters on {roles.device}, {roles.layout} batches.")
    for note in memory_option_notes(roles, config):
        say(note)
    return roles, samples
