"""The run of SFT, reward and DPO (`run_recipe`); a `Recipe` has what differs between them. PPO uses parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from onecard import reporting
from onecard.algorithms.samples import HeldoutSampler, make_heldout_sampler
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
B = TypeVar("B", bound="DataclassInstance")  # a batch of examples


@dataclass(frozen=True)
class Collation(Generic[E, B]):
    """A way to batch examples. `collate(examples)` makes the batch; `size(example)`: its tokens in a forward pass."""

    collate: Callable[[Sequence[E]], B]
    size: Callable[[E], int] = len


def padded_size(lengths: Sequence[int]) -> int:
    """Number of tokens, with padding, of texts that are padded to the longest. Empty texts take none."""
    return sum(length > 0 for length in lengths) * max(lengths)


def check_layout_and_decoding(
    config: TrainConfig,
    roles: Roles,
    training: Sequence[object],
    heldout: Sequence[object],
    sampler: HeldoutSampler | None,
) -> None:
    """Startup checks that choose layout and decoding mode, on texts as long as the run's longest."""
    lengths = [*all_lengths(training), *all_lengths(heldout)]
    longest_text, largest_example = max(map(max, lengths)), max(map(sum, lengths))
    items = max(config.per_device_train_batch_size, config.per_device_eval_batch_size)
    row = max(config.micro_batch_tokens or items * largest_example, largest_example)
    check_model(roles, longest_text, row=row)
    if sampler is not None:
        check_decoding(roles, sampler.longest)


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
    reference: bool = False  # the loss needs a frozen reference
    scalar: bool = False  # the trained role has a scalar head
    # metrics of the held-out examples, if they are not sums over micro-batches
    heldout_metrics: Callable[[Roles, Sequence[E], TokenBudget, Bar], dict[str, float]] | None = None
    adjust: Callable[[Roles, Sequence[E]], None] | None = None  # changes the trained weights before the export
    check: Callable[[Sequence[E]], None] | None = None  # raises if the settings do not fit the training examples
    # (roles, training, held-out examples) -> both with added fields; called before the first step
    prepare: Callable[[Roles, Sequence[E], Sequence[E]], tuple[Sequence[E], Sequence[E]]] | None = None
    # used instead of `collate` with packed batches: runs a prompt once for all its responses
    prompt_sharing_collation: Collation[E, B] | None = None
    unsplittable_loss: str = ""  # `Objective.unsplittable_loss`

    def objective(self, roles: Roles) -> Objective[E, B]:
        """The objective of an optimizer step in the roles' layout."""
        if self.prompt_sharing_collation and roles.layout == "packed":
            collation = self.prompt_sharing_collation
        elif roles.layout == "padded":
            collation = Collation(self.collate, lambda example: padded_size(lengths_of(example)))
        else:
            collation = Collation(self.collate)
        return Objective(
            collation.collate,
            self.count,
            lambda batch, normalizer: (self.loss(roles, batch, normalizer),),
            collation.size,
            self.unsplittable_loss,
        )


def pair_tokenizer(config: TrainConfig) -> Callable[[Iterable[Row], Any, int], Tokenized[PreferencePair]]:
    """`Recipe.tokenize` for `prompt`, `chosen`, `rejected` rows."""

    def tokenize(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Tokenized[PreferencePair]:
        return preference_examples(
            rows,
            tokenizer,
            max_length=max_length,
            truncation_mode=config.truncation_mode,
            skip_bad_rows=config.skip_bad_rows,
        )

    return tokenize


def effective_max_length(config: TrainConfig | EvaluateConfig) -> int:
    """`max_length`, or the model's context length if that is less. Prints a line then."""
    limit = context_length(config)
    if limit is None or config.max_length <= limit:
        return config.max_length
    say(f"max_length: {limit} is used instead of {config.max_length}, because the model's context is no longer.")
    return limit


def load_examples(
    config: TrainConfig, tokenize: Callable[[Iterable[Row]], Tokenized[P]]
) -> tuple[Sequence[P], Sequence[P]]:
    """Training and held-out examples. Prints how many there are, and how many were truncated, skipped or unusual."""
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
    """Export the first trained role (PPO: the policy), write the report, and print their paths."""
    role = roles.trained[0]
    exported = run.folder / role
    run_folder.write_folder(run.folder, role, lambda folder: roles.export(role, folder, tokenizer))
    written = reporting.write_run_report(run.folder)
    say(f"weights: {exported}    metrics: {run.folder / run_folder.METRICS}    plots: {written}")
    return exported


def describe_adapter(roles: Roles, role: str, source: Path | None) -> str:
    """A trained adapter in words. `source`: the adapter folder that training continues; its rank may not be lora_r."""
    if source is not None:
        return f"an adapter of rank {roles.rank(role)}, continued from {source}"
    without = f", without {' and '.join(roles.left_out)}" if roles.left_out else ""
    return f"an adapter of rank {roles.rank(role)} on {roles.num_adapted_layers(role)} layers{without}"


def run_recipe(config: TrainConfig, recipe: Recipe[E, B]) -> Path:
    """Run a training command and return the folder of its weights. `config` is validated already.

    Nothing is written before data and model are loaded and checked.
    """
    config = with_output_dir(config, recipe.command)
    run = open_run(config)
    with head_chunks(config.head_chunk_tokens), template_date(run.info.date):
        tokenizer = load_tokenizer(config)
        max_length = effective_max_length(config)
        training: Sequence[E]
        heldout: Sequence[E]
        training, heldout = load_examples(config, lambda rows: recipe.tokenize(rows, tokenizer, max_length))
        if recipe.check:
            recipe.check(training)
        roles, sampler = load_and_check(config, recipe, tokenizer, training, heldout)
        if config.dry_run:
            dry_run.show(config, roles, tokenizer, training[0])
            return run.folder
        identity = supervised_identity(config, recipe.command, training, heldout)
        if recipe.prepare:
            training, heldout = recipe.prepare(roles, training, heldout)
        metrics = partial(recipe.heldout_metrics, roles, heldout) if recipe.heldout_metrics else None
        job = Supervised(config, recipe.command, recipe.objective(roles), training, heldout, sampler, metrics)
        with run_folder.locked(run):
            Trainer(config, job, roles, run).train(identity)
            if recipe.adjust:
                recipe.adjust(roles, training)
            return export_and_report(roles, tokenizer, run)


def load_and_check(
    config: TrainConfig, recipe: Recipe[E, B], tokenizer: Any, training: Sequence[E], heldout: Sequence[E]
) -> tuple[Roles, HeldoutSampler | None]:
    """Load the roles and run the startup checks. Returns the roles, and the sampler for held-out prompts if any."""
    roles = load_roles(config, trained=recipe.trained, reference=recipe.reference, scalar=recipe.scalar)
    check_tokens(roles.causal_model(), tokenizer, [*all_tokens(training), *all_tokens(heldout)])
    sampler = make_heldout_sampler(config, roles, tokenizer, heldout) if isinstance(config, PolicyTrainConfig) else None
    check_layout_and_decoding(config, roles, training, heldout, sampler)
    trained = sum(parameter.numel() for parameter in roles.trained_parameters().values())
    if config.use_peft:
        say(f"{recipe.trained}: {describe_adapter(roles, recipe.trained, find_source(config.model).adapter)}.")
    say(f"model: {trained:,} trained parameters on {roles.device}, {roles.layout} batches.")
    for note in memory_option_notes(roles, config):
        say(note)
    return roles, sampler
