"""The training loop of all algorithms. A job's step calls `compute_gradients` and `optimizer_step`.

    step -> examples -> micro-batches -> losses, backward -> clip -> optimizer step -> schedule -> row of metrics

The order of the examples is a function of the seed and the step, so a checkpoint stores the step and no data order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from onecard.config import TrainConfig
from onecard.data.batches import to_device
from onecard.models.micro_batching import (
    MEMORY_ADVICE,
    TRAINING_MESSAGES,
    MicroBatchSize,
    TokenBudget,
    free_memory,
)
from onecard.training import checkpoint, run_folder
from onecard.training.metrics import MetricsWindow, divide_sums_by_counts, peak_memory_gib, sum_metrics
from onecard.training.optim import clip_grad_norm, make_optimizer, make_scheduler
from onecard.training.run_folder import Run
from onecard.training.signals import interrupted, stop_requests
from onecard.utils.errors import OnecardError, is_out_of_memory
from onecard.utils.progress import Bar, progress, say
from onecard_kernels import Loss

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

E = TypeVar("E", bound=Sized)  # one example; its length is its number of tokens
B = TypeVar("B", bound="DataclassInstance")  # a batch of examples


@dataclass(frozen=True)
class Objective(Generic[E, B]):
    """How the loss of one optimizer step is computed.

    `count` returns the normaliser: the number of pairs, or of response tokens, in all micro-batches of the step.
    `losses` takes a batch and the normaliser. It may yield several losses, one for each role: the backward of one runs
    before the forward of the next, so only one role's activations are in memory.
    """

    collate: Callable[[Sequence[E]], B]
    count: Callable[[Sequence[E]], int]
    losses: Callable[[B, int], Iterable[Loss]]
    size: Callable[[E], int] = len  # tokens that an example takes in a forward pass
    unsplittable_loss: str = ""  # name of a loss that sorts all examples of a step, so the step cannot be split


class TrainedModel(Protocol):
    """The part of `Roles` that the trainer uses."""

    layout: str

    @property
    def device(self) -> torch.device: ...
    def train(self, mode: bool = True) -> Any: ...
    def trained_parameters(self) -> dict[str, nn.Parameter]: ...
    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path) -> None: ...


class Job(Protocol):
    """A training algorithm, as the trainer uses it."""

    name: str
    total_steps: int
    first_schedule_step: int  # step of the learning rate schedule at the run's first step

    def batches(self, first_step: int) -> Iterator[tuple[float, list[int]]]:
        """Yield `(epochs completed after the step, example indices)` for each step from `first_step` (from 0) on."""
        ...

    def step(self, trainer: Trainer, indices: Sequence[int], bar: Bar) -> dict[str, float]:
        """Run a step: `trainer.compute_gradients` and `trainer.optimizer_step`, once or more. Returns its metrics."""
        ...

    def evaluate(self, trainer: Trainer, bar: Bar) -> dict[str, float]:
        """Metrics of the held-out examples; empty if there are none."""
        ...

    def counts(self, step: int) -> dict[str, int]:
        """Counts to log after `step`, besides steps and tokens (PPO: episodes)."""
        ...

    def state(self) -> dict[str, Any]:
        """The job's own state for the checkpoint, as JSON values. The trainer saves weights, optimizer and schedule."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        ...


def micro_batches(
    objective: Objective[E, B], examples: Sequence[E], size: MicroBatchSize, device: torch.device
) -> Iterator[B]:
    """A step's examples as batches on the device, split by `size`."""
    for indices in size.split([objective.size(example) for example in examples]):
        yield to_device(objective.collate([examples[index] for index in indices]), device)


def accumulate(
    objective: Objective[E, B], examples: Sequence[E], size: MicroBatchSize, device: torch.device
) -> list[Loss]:
    """Add the loss's gradients to the parameters' `.grad`. Reads no tensor values, so it runs on meta tensors too."""
    normalizer = objective.count(examples)
    losses = []
    for batch in micro_batches(objective, examples, size, device):
        for loss in objective.losses(batch, normalizer):
            loss.loss.backward()
            losses.append(Loss(loss.loss.detach(), loss.metrics))
    return losses


class Trainer:
    """One run of one job: optimizer, schedule, running metrics, checkpoints."""

    def __init__(self, config: TrainConfig, job: Job, model: TrainedModel, run: Run) -> None:
        self.config, self.job, self.model, self.run = config, job, model, run
        self.parameters = list(model.trained_parameters().values())
        self.optimizer = make_optimizer(config, self.parameters)
        self.scheduler = make_scheduler(config, self.optimizer, job.total_steps, first=job.first_schedule_step)
        size = MicroBatchSize(
            config.per_device_train_batch_size, config.micro_batch_tokens, padded=model.layout == "padded"
        )
        self.budget = TokenBudget(size, TRAINING_MESSAGES)
        self.step = 0
        self.num_tokens = 0
        self.window = MetricsWindow()

    @property
    def micro_batch_size(self) -> MicroBatchSize:
        """The current micro-batch size, which out-of-memory errors reduce."""
        return self.budget.size

    def restore(self) -> None:
        """Restore the run's checkpoint."""
        assert self.run.checkpoint is not None
        self.model.restore(self.run.checkpoint.folder)
        training, state = checkpoint.read_checkpoint(self.run.checkpoint)
        self.optimizer.load_state_dict(training["optimizer"])
        self.scheduler.load_state_dict(training["scheduler"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.window = MetricsWindow(**state["window"])
        self.budget.size = replace(self.micro_batch_size, tokens=state["micro_batch_tokens"])
        self.job.restore(state["job"])

    def save(self) -> Path:
        """Write a checkpoint of this step. Raises if a weight is NaN or infinite."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self.diverged("weights are NaN or infinite")
        return checkpoint.write_checkpoint(
            self.run.folder,
            self.step,
            run=self.run.info.id,
            logs=run_folder.LOGS,
            save_weights=self.model.save,
            training={"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            state={
                "num_tokens": self.num_tokens,
                "window": self.window.state(),
                "micro_batch_tokens": self.micro_batch_size.tokens,
                "job": self.job.state(),
            },
            keep=self.config.save_total_limit,
        )

    def diverged(self, cause: str) -> OnecardError:
        """The error for a loss or weights that are NaN or infinite."""
        return OnecardError(
            f"{self.job.name}: {cause} after step {self.step}; a lower learning_rate or max_grad_norm usually helps. "
            "The last checkpoint was written before that."
        )

    @contextmanager
    def nan_as_divergence(self) -> Iterator[None]:
        """Context that turns the kernels' ValueError for NaN inputs into the error of a diverged run."""
        try:
            yield
        except ValueError as error:
            if "NaN" in str(error):
                raise self.diverged(str(error)) from error
            raise

    def compute_gradients(self, objective: Objective[E, B], examples: Sequence[E]) -> dict[str, float]:
        """Compute the clipped gradients of the examples' loss. Returns the step's metrics.

        The result does not depend on the micro-batch size, except with kto. After an out-of-memory error the step is
        repeated with smaller micro-batches.
        """
        while True:
            try:
                with self.nan_as_divergence():
                    losses = accumulate(objective, examples, self.micro_batch_size, self.model.device)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            free_memory()
            self.zero_grad()
            if objective.unsplittable_loss:
                raise OnecardError(
                    f"out of memory: {objective.unsplittable_loss} sorts the {len(examples)} examples of a step as one "
                    f"batch, which cannot be split. Lower per_device_train_batch_size. {MEMORY_ADVICE}"
                )
            self.budget.shrink([objective.size(example) for example in examples], padded=self.micro_batch_size.padded)
        norm = clip_grad_norm(self.parameters, self.config.max_grad_norm or math.inf)
        row = {**sum_metrics(losses), "grad_norm": float(norm)}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise self.diverged(f"loss {row['loss']}, gradient norm {row['grad_norm']}")
        return row

    def optimizer_step(self) -> None:
        """Make the optimizer step and clear the gradients."""
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def log_step(self, epoch: float, row: dict[str, float]) -> None:
        """Add a step's metrics to the window. Every `logging_steps`, log their means over the window."""
        self.window.add(row)
        if self.step % self.config.logging_steps == 0 or self.step == self.job.total_steps:
            self.log(
                {
                    "epoch": round(epoch, 6),
                    **self.window.take(),
                    **self.job.counts(self.step),
                    "num_tokens": self.num_tokens,
                }
            )

    def log(self, values: dict[str, Any]) -> None:
        run_folder.log(self.run.folder, {"step": self.step, **values})

    @torch.no_grad()
    def evaluate(self, bar: Bar) -> None:
        """Log the metrics of the held-out examples as `eval_...`, if there are any."""
        row = self.job.evaluate(self, bar)
        if row:
            self.log({f"eval_{name}": value for name, value in row.items()})

    def is_due(self, every: int) -> bool:
        """Whether this step is the last, or a multiple of `every` (0: the last step only)."""
        return self.step == self.job.total_steps or (every > 0 and self.step % every == 0)

    def train(self, identity: dict[str, str]) -> None:
        """Start or resume the run, and train to its last step or until Ctrl-C."""
        for note in self.run.notes:
            say(note)
        run_folder.begin(self.run, self.config, identity)
        self.model.train()
        if self.run.checkpoint is not None:
            self.restore()
            keep = self.config.save_total_limit
            checkpoint.remove_old_checkpoints(self.run.folder, self.step, run=self.run.info.id, keep=keep)
        with stop_requests() as stopping, progress(self.job.name, self.job.total_steps) as bar:
            bar.advance(by=self.step)
            if self.step == 0:
                self.evaluate(bar)
            for epoch, indices in self.job.batches(self.step):
                rate = float(self.scheduler.get_last_lr()[0])
                row = {**self.job.step(self, indices, bar), "learning_rate": rate}
                self.scheduler.step()
                self.step += 1
                row["memory/peak_gib"] = peak_memory_gib()
                self.log_step(epoch, row)
                bar.advance(divide_sums_by_counts(row))
                if self.is_due(self.config.eval_steps):
                    self.evaluate(bar)
                stop = stopping() and self.step < self.job.total_steps
                if stop or self.is_due(self.config.save_steps):
                    saved = self.save()
                if stop:
                    raise interrupted(saved)
