"""One DPO step from examples to changed weights: what both sides are given, and ours. `peer.py` has TRL's.

Both have the same base, the same adapter values, the same pairs in the same order and the same settings of AdamW. What
is timed is each library's own step: `Supervised.step` (gradients, clipping, optimizer, metrics) and
`DPOTrainer.training_step` with the clipping and the optimizer of transformers' loop. Making records is ours to pay;
TRL's collator runs before its time begins.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import Progress

from benchmarks.train_step.cases import Case
from benchmarks.train_step.material import DTYPES, Pair, drawn_weights
from benchmarks.train_step.watch import OPTIMIZER, TRAIN, Watch
from onecard.algorithms.common import Recipe
from onecard.algorithms.dpo.command import make_recipe
from onecard.algorithms.supervised import Supervised
from onecard.config import DPOConfig, Optim
from onecard.data.batches import PreferencePair, TokenSequence
from onecard.models.build import load_roles
from onecard.training.run_folder import Run
from onecard.training.trainer import Trainer
from onecard.utils.progress import Bar

CPU = torch.device("cpu")
NOISE = 0.01  # standard deviation of adapters' second matrix: with zeros, the policy is its reference and says nothing
SAME = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True)
class Task:
    """What both sides are given."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    pairs: tuple[Pair, ...]
    per_step: int  # pairs of an optimizer step
    per_pass: int  # pairs of a micro-batch
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    precompute_ref_log_probs: bool = False
    optim: Optim = "adamw_torch"

    def places(self, step: int) -> list[int]:
        """Which pairs a step learns from."""
        return [(step * self.per_step + place) % len(self.pairs) for place in range(self.per_step)]

    def tokens(self, step: int) -> int:
        """Real tokens of a step."""
        return sum(self.pairs[place].tokens for place in self.places(step))


class Side(ABC):
    """A trainer that takes one optimizer step each time it is called, on the next pairs."""

    def __init__(self, task: Task) -> None:
        self.task, self.done = task, 0
        self.row: dict[str, float] = {}
        self.learned: list[tuple[float, float]] = []  # loss and gradient norm of each step

    @abstractmethod
    def ready(self) -> None:
        """What is outside of a step's time."""

    @abstractmethod
    def step(self, places: Sequence[int]) -> dict[str, float]:
        """One optimizer step on these pairs; its row."""

    def __call__(self) -> None:
        self.row = self.step(self.task.places(self.done))
        self.learned.append((self.row["loss"], self.row["grad_norm"]))
        self.done += 1

    @abstractmethod
    def model(self) -> Any:
        """What holds the weights."""

    @abstractmethod
    def optimizer(self) -> Any:
        """What updates them."""


def task_on(
    case: Case, folder: Path, dtype: torch.dtype, device: torch.device = CPU, pairs: Sequence[Pair] = ()
) -> Task:
    """A case as a task, on these pairs."""
    return Task(folder, device, dtype, tuple(pairs), case.items, case.per_pass, **case.settings)


def own_settings(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Of ours alone: TRL counts pairs, and has no other dtype for adapters."""
    return {"micro_batch_tokens": case.micro_batch_tokens, "adapter_dtype": DTYPES[dtype]}


def config_of(task: Task, *, share_prompts: bool = True, **settings: Any) -> DPOConfig:
    """Ours."""
    return DPOConfig(
        model=str(task.folder),
        dtype=DTYPES[task.dtype],
        load_in_4bit=task.load_in_4bit,
        gradient_checkpointing=task.gradient_checkpointing,
        precompute_ref_log_probs=task.precompute_ref_log_probs,
        per_device_train_batch_size=task.per_pass,
        gradient_accumulation_steps=task.per_step // task.per_pass,
        max_steps=1 << 30,
        share_prompts=share_prompts,
        optim=task.optim,
        lr_scheduler_type="constant",
        **settings,
    )


def no_bar() -> Bar:
    """A progress bar that shows nothing."""
    return Bar(Progress(disable=True), "", 0)


class Ours(Side):
    """`onecard dpo`, with prompts shared or not."""

    def __init__(self, task: Task, *, share_prompts: bool = True, **settings: Any) -> None:
        super().__init__(task)
        config = config_of(task, share_prompts=share_prompts, **settings)
        self.examples = [example(pair) for pair in task.pairs]
        with drawn_weights():
            self.roles = load_roles(config, trained="policy", reference=True)
        shake(self.roles.model)
        recipe: Recipe[Any, Any] = make_recipe(config)
        if recipe.prepare:
            with mock.patch.dict(os.environ, {"ONECARD_CACHE": str(task.folder / "cache")}):
                self.examples = list(recipe.prepare(self.roles, self.examples, [])[0])
        self.job = Supervised(config, "dpo", recipe.objective(self.roles), self.examples, [])
        self.trainer = Trainer(config, self.job, self.roles, Run(task.folder, None, ()))
        self.roles.train()
        self.bar, self.first_cuts = no_bar(), self.cuts()

    def ready(self) -> None:
        """Nothing is."""

    def step(self, places: Sequence[int]) -> dict[str, float]:
        return self.job.step(self.trainer, places, self.bar)

    def cuts(self) -> tuple[Any, ...]:
        """How passes are cut now."""
        return self.trainer.micro_batch_size, self.job.budget.size

    def watched(self, watch: Watch) -> None:
        """A step, watched by phase."""
        with ExitStack() as stack:
            for phase, name in ((TRAIN, "gradients"), (OPTIMIZER, "apply")):
                changed = watch.around(phase, getattr(self.trainer, name))
                stack.enter_context(mock.patch.object(self.trainer, name, changed))
            with watch.whole():
                self()

    def model(self) -> Any:
        return self.roles.model

    def optimizer(self) -> Any:
        return self.trainer.optimizer


def example(pair: Pair) -> PreferencePair:
    """The same tokens as our record."""

    def side(answer: tuple[int, ...]) -> TokenSequence:
        return TokenSequence(pair.prompt + answer, (False,) * len(pair.prompt) + (True,) * len(answer))

    return PreferencePair(side(pair.chosen), side(pair.rejected))


def shake(model: Any) -> None:
    """Give every adapter the same values, whatever it is called: N(0, 1 / columns) and N(0, NOISE)."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            std = NOISE if "lora_B" in name else parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).normal_(std=std, generator=generator)
            parameter.data.copy_(values)


def quiet() -> None:
    """Keep advice that is the same in each run off the terminal."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "trl", "accelerate", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def held_bytes(model: Any, optimizer: Any, *, paged: bool = True) -> int:
    """Weights, what quantized ones need beside them, buffers, and the optimizer's states and float32 copies of weights.

    Not `paged`: without states in memory that host and card share, which the card's allocator knows nothing of.
    """
    states = [value for state in optimizer.state.values() for value in state.values()]
    states += [updated for group in optimizer.param_groups for updated in group["params"]]
    quantized = [
        value
        for parameter in model.parameters()
        for each in (getattr(parameter, "quant_state", None),)
        if each is not None
        for value in (each.absmax, each.code, *((each.state2.absmax, each.state2.code) if each.nested else ()))
    ]
    tensors = [*model.parameters(), *model.buffers(), *states, *quantized]
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in tensors
        if torch.is_tensor(each) and (paged or not getattr(each, "is_paged", False))
    }
    return sum(storages.values())


def forget() -> None:
    """Give freed memory back, the cached part too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
