"""The training loop. It knows no algorithm: it is handed examples and a function that returns `(loss, metrics)`.

    step -> its examples -> micro-batches -> record -> loss, backward -> clip -> optimizer -> schedule -> row

The order of the data is a function of `(seed, epoch)` and the position in it a function of the step, so a checkpoint
needs no more than the step to know where it stands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from onecard import checkpoint, runs
from onecard.batches import to_device
from onecard.config import TrainConfig
from onecard.data import step_indices
from onecard.errors import OnecardError
from onecard.metrics import Bar, Window, add_up, peak_memory_gib, progress, say
from onecard.optim import make_optimizer, make_scheduler
from onecard.runs import Run
from onecard_kernels import Loss

E = TypeVar("E", bound=Sized)  # one example; its length is its number of tokens
B = TypeVar("B")  # a record of several


@dataclass(frozen=True)
class Task(Generic[E, B]):
    """What an algorithm hands to the trainer.

    `count` is what a step's summed losses are divided by (pairs, or response tokens), over all micro-batches of the
    step: the one normaliser. `loss` gets a record and that number.
    """

    name: str
    train: Sequence[E]
    heldout: Sequence[E]
    collate: Callable[[Sequence[E]], B]
    count: Callable[[Sequence[E]], int]
    loss: Callable[[B, int], Loss]


class Weights(Protocol):
    """What the trainer needs of the model."""

    @property
    def device(self) -> torch.device: ...
    def train(self, mode: bool = True) -> Any: ...
    def trained_parameters(self) -> dict[str, nn.Parameter]: ...
    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How many steps there are, and which examples each one sees."""

    num_examples: int
    examples_per_step: int
    total_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_examples / self.examples_per_step)

    def batches(self, first_step: int) -> Iterator[tuple[float, list[int]]]:
        """`(epochs done after the step, example indices)` of each step from `first_step` (counted from 0) on."""
        order: list[list[int]] = []
        for step in range(first_step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if not order or place == 0:
                order = step_indices(self.num_examples, self.examples_per_step, seed=self.seed, epoch=epoch)
            yield (step + 1) / self.steps_per_epoch, order[place]


def make_plan(config: TrainConfig, num_examples: int) -> Plan:
    """Turn epochs or `max_steps` into optimizer steps."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    per_epoch = math.ceil(num_examples / per_step)
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    if total == 0:
        raise OnecardError("num_train_epochs: 0 epochs are 0 steps; expected more than 0.")
    return Plan(num_examples, per_step, total, config.seed)


def micro_batches(task: Task[E, B], examples: Sequence[E], size: int, device: torch.device) -> Iterator[B]:
    """Cut a step's examples into records of at most `size` examples, on the device."""
    for start in range(0, len(examples), size):
        yield to_device(task.collate(examples[start : start + size]), device)


class Trainer(Generic[E, B]):
    """One run of one task: optimizer, schedule, running metrics, checkpoints."""

    def __init__(self, config: TrainConfig, task: Task[E, B], weights: Weights, run: Run) -> None:
        self.config, self.task, self.weights, self.run = config, task, weights, run
        self.plan = make_plan(config, len(task.train))
        self.parameters = list(weights.trained_parameters().values())
        self.optimizer = make_optimizer(config, self.parameters)
        self.scheduler = make_scheduler(config, self.optimizer, self.plan.total_steps)
        self.step = 0
        self.num_tokens = 0
        self.window = Window()

    def restore(self) -> None:
        """Go back to the run's checkpoint."""
        assert self.run.checkpoint is not None
        self.weights.restore(self.run.checkpoint.folder)
        training, state = checkpoint.read_checkpoint(self.run.checkpoint)
        self.optimizer.load_state_dict(training["optimizer"])
        self.scheduler.load_state_dict(training["scheduler"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.window = Window(**state["window"])

    def save(self) -> None:
        """Write a checkpoint of this step, unless its update has broken the weights."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self.diverged("weights that are no numbers")
        checkpoint.write_checkpoint(
            self.run.folder,
            self.step,
            save_weights=self.weights.save,
            training={"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            state={"num_tokens": self.num_tokens, "window": self.window.state()},
            keep=self.config.save_total_limit,
        )

    def diverged(self, what: str) -> OnecardError:
        """The error of a run whose numbers are none any more."""
        return OnecardError(
            f"{self.task.name}: {what} after step {self.step}; a lower learning_rate or max_grad_norm usually helps. "
            "The last checkpoint is from before that."
        )

    def loss_of(self, batch: B, normalizer: int) -> Loss:
        """The task's loss. The kernels refuse NaN by name, which here means that the last update broke the weights."""
        try:
            return self.task.loss(batch, normalizer)
        except ValueError as error:
            if "NaN" in str(error):
                raise self.diverged(str(error)) from error
            raise

    def optimize(self, indices: Sequence[int]) -> dict[str, float]:
        """One optimizer step. The result does not depend on how it is cut into micro-batches, to rounding."""
        began = time.perf_counter()
        examples = [self.task.train[index] for index in indices]
        normalizer = self.task.count(examples)
        losses = []
        size = self.config.per_device_train_batch_size
        for batch in micro_batches(self.task, examples, size, self.weights.device):
            loss = self.loss_of(batch, normalizer)
            loss.loss.backward()
            losses.append(Loss(loss.loss.detach(), loss.metrics))
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        row = {**add_up(losses), "grad_norm": float(norm), "learning_rate": self.scheduler.get_last_lr()[0]}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise self.diverged(f"loss {row['loss']}, gradient norm {row['grad_norm']}")
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(map(len, examples))
        self.num_tokens += tokens
        self.step += 1
        return {**row, "time/tokens_per_second": tokens / (time.perf_counter() - began)}

    def log_step(self, epoch: float, row: dict[str, float]) -> None:
        """Add a step to the window, and write the window's means when it is time."""
        self.window.add(row)
        if self.step % self.config.logging_steps == 0 or self.step == self.plan.total_steps:
            self.log({"epoch": round(epoch, 6), **self.window.take(), "num_tokens": self.num_tokens})

    def log(self, values: dict[str, Any]) -> None:
        runs.log(self.run.folder, {"step": self.step, **values})

    @torch.no_grad()
    def evaluate(self, bar: Bar) -> None:
        """Write a row of loss and metrics over all held-out examples, named `eval_...`, if anything is held out."""
        heldout, size = self.task.heldout, self.config.per_device_eval_batch_size
        if not heldout:
            return
        normalizer, losses = self.task.count(heldout), []
        with bar.part("evaluate", len(heldout)) as part:
            for batch in micro_batches(self.task, heldout, size, self.weights.device):
                losses.append(self.loss_of(batch, normalizer))
                part.advance(by=size)
        self.log({f"eval_{name}": value for name, value in add_up(losses).items()})

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last, happens now."""
        return self.step == self.plan.total_steps or (every > 0 and self.step % every == 0)

    def train(self) -> None:
        """From the checkpoint, or the start, to the last step."""
        self.weights.train()
        if self.run.checkpoint is not None:
            self.restore()
        with progress(self.task.name, self.plan.total_steps) as bar:
            bar.advance(by=self.step)
            if self.step == 0:
                self.evaluate(bar)
            for epoch, indices in self.plan.batches(self.step):
                row = self.optimize(indices)
                row["memory/peak_gib"] = peak_memory_gib()
                self.log_step(epoch, row)
                bar.advance(row)
                if self.is_due(self.config.eval_steps):
                    self.evaluate(bar)
                if self.is_due(self.config.save_steps):
                    self.save()


def train(config: TrainConfig, task: Task[E, B], weights: Weights, run: Run, identity: dict[str, str]) -> None:
    """Run `task` to its last step in `run.folder`."""
    trainer = Trainer(config, task, weights, run)
    for note in run.notes:
        say(note)
    runs.begin(run, config, identity)
    trainer.train()
