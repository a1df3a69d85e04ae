"""The job of SFT, reward and DPO: one optimizer step for each batch of fixed examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from onecard.algorithms.samples import HeldoutSampler
from onecard.config import TrainConfig
from onecard.data import step_indices
from onecard.data.batches import to_device
from onecard.models.micro_batching import MicroBatchSize, TokenBudget, run_micro_batches
from onecard.training import run_folder
from onecard.training.metrics import divide_sums_by_counts, sum_metrics
from onecard.training.trainer import B, E, Objective, Trainer
from onecard.utils.errors import OnecardError
from onecard.utils.progress import Bar
from onecard_kernels import Loss


@dataclass(frozen=True)
class StepSchedule:
    """The number of steps, and the examples of each."""

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
            epoch, index = divmod(step, self.steps_per_epoch)
            if not order or index == 0:
                order = step_indices(self.num_examples, self.examples_per_step, seed=self.seed, epoch=epoch)
            yield (step + 1) / self.steps_per_epoch, order[index]


def make_schedule(config: TrainConfig, num_examples: int) -> StepSchedule:
    """The schedule for `num_train_epochs`, or for `max_steps` if that is given."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    per_epoch = math.ceil(num_examples / per_step)
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    if total == 0:
        raise OnecardError("num_train_epochs: 0 epochs are 0 steps; expected more than 0.")
    return StepSchedule(num_examples, per_step, total, config.seed)


class Supervised(Generic[E, B]):
    """A `Job`: each step is one optimizer step on the next examples."""

    first_schedule_step = 0

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        objective: Objective[E, B],
        training: Sequence[E],
        heldout: Sequence[E],
        sampler: HeldoutSampler | None = None,
        # metrics of held-out examples, if they are not sums over micro-batches
        heldout_metrics: Callable[[TokenBudget, Bar], dict[str, float]] | None = None,
    ) -> None:
        self.name, self.objective = name, objective
        self.training, self.heldout = training, heldout
        self.sampler, self.heldout_metrics = sampler, heldout_metrics
        # of evaluations; the trainer has that of training
        self.budget = TokenBudget(MicroBatchSize(config.per_device_eval_batch_size, config.micro_batch_tokens))
        self.schedule = make_schedule(config, len(training))
        self.total_steps = self.schedule.total_steps

    def batches(self, first_step: int) -> Iterator[tuple[float, list[int]]]:
        return self.schedule.batches(first_step)

    def step(self, trainer: Trainer, indices: Sequence[int], bar: Bar) -> dict[str, float]:
        began = time.perf_counter()
        examples = [self.training[index] for index in indices]
        row = trainer.compute_gradients(self.objective, examples)
        trainer.optimizer_step()
        tokens = sum(map(len, examples))
        trainer.num_tokens += tokens
        return {**row, "time/tokens_per_second": tokens / (time.perf_counter() - began)}

    def evaluate(self, trainer: Trainer, bar: Bar) -> dict[str, float]:
        """Loss and metrics over all held-out examples. Writes responses to a few prompts to `samples.jsonl`."""
        if not self.heldout:
            return {}
        if self.heldout_metrics is not None:
            return self.heldout_metrics(self.budget, bar)
        objective, heldout, model = self.objective, self.heldout, trainer.model
        normalizer = objective.count(heldout)
        with bar.part("evaluate", len(heldout)) as part:

            def compute_losses(indices: list[int]) -> list[Loss]:
                batch = to_device(objective.collate([heldout[index] for index in indices]), model.device)
                with trainer.nan_as_divergence():
                    batch_losses = list(objective.losses(batch, normalizer))
                part.advance(by=len(indices))
                return batch_losses

            sizes = [objective.size(example) for example in heldout]
            passes = run_micro_batches(sizes, self.budget, compute_losses, padded=model.layout == "padded")
        losses = [loss for _, batch_losses in passes for loss in batch_losses]
        for sample in self.sampler(bar) if self.sampler else []:
            run_folder.log(trainer.run.folder, {"step": trainer.step, **sample}, run_folder.SAMPLES)
        return divide_sums_by_counts(sum_metrics(losses))

    def counts(self, step: int) -> dict[str, int]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"evaluation_tokens": self.budget.size.tokens}

    def restore(self, state: dict[str, Any]) -> None:
        self.budget.size = replace(self.budget.size, tokens=state["evaluation_tokens"])
