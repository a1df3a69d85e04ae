"""One optimizer step of DPO, by onecard and by TRL.

Both have the same base, adapter values, pairs in the same order, and settings of AdamW. What is timed is each library's
own step: `Supervised.step` (batches, gradients, clipping, optimizer, metrics), and `DPOTrainer.training_step` with the
clipping and the optimizer of transformers' loop. TRL's collator runs before its time begins.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import Progress

from benchmarks.train_step.cases import StepCase
from benchmarks.train_step.phases import OPTIMIZER, TRAIN, PhaseTimer
from benchmarks.train_step.synthetic import DTYPES, Pair, load_word_tokenizer, random_model, random_weights, text
from onecard.algorithms.common import Recipe
from onecard.algorithms.dpo.command import make_recipe
from onecard.algorithms.supervised import Supervised
from onecard.config import DPOConfig
from onecard.data.batches import PreferencePair, TokenSequence
from onecard.models.build import load_roles
from onecard.models.four_bit import nf4_settings
from onecard.training.run_folder import Run
from onecard.training.trainer import Trainer
from onecard.utils.progress import Bar

CPU = torch.device("cpu")
NOISE = 0.01  # standard deviation of adapters' second matrix: with zeros the policy would equal its reference
COMPARED_METRICS = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True)
class Task:
    """The common input of both trainers."""

    case: StepCase
    folder: Path
    dtype: torch.dtype
    device: torch.device = CPU
    pairs: tuple[Pair, ...] = ()

    def indices(self, step: int) -> list[int]:
        """Which pairs a step learns from."""
        return [(step * self.case.batch_size + index) % len(self.pairs) for index in range(self.case.batch_size)]

    def tokens(self, step: int) -> int:
        """Real tokens of a step."""
        return sum(self.pairs[index].tokens for index in self.indices(step))


class DPOStepper:
    """A trainer that takes one optimizer step on the next pairs each time it is called.

    A method `ready`, if there is one, does what is outside of a step's time.
    """

    model: Any
    optimizer: Any

    def __init__(self, task: Task) -> None:
        self.task, self.done = task, 0
        self.row: dict[str, float] = {}
        self.losses_and_grad_norms: list[tuple[float, float]] = []  # of each step

    def step(self, indices: Sequence[int]) -> dict[str, float]:
        """One optimizer step on these pairs; its metrics."""
        raise NotImplementedError

    def __call__(self) -> None:
        self.row = self.step(self.task.indices(self.done))
        self.losses_and_grad_norms.append((self.row["loss"], self.row["grad_norm"]))
        self.done += 1


def config_of(task: Task, **changes: Any) -> DPOConfig:
    """onecard's settings. TRL counts pairs instead of tokens, and has no other dtype for adapters."""
    case = task.case
    config = DPOConfig(
        model=str(task.folder),
        dtype=DTYPES[task.dtype],
        adapter_dtype=DTYPES[task.dtype],
        micro_batch_tokens=case.micro_batch_tokens,
        per_device_train_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=case.batch_size // case.micro_batch_size,
        max_steps=1 << 30,
        lr_scheduler_type="constant",
        **case.settings,
    )
    return replace(config, **changes)


def no_bar() -> Bar:
    """A progress bar that shows nothing."""
    return Bar(Progress(disable=True), "", 0)


class OnecardDPO(DPOStepper):
    """`onecard dpo`, with changes to the settings of the task."""

    def __init__(self, task: Task, **changes: Any) -> None:
        super().__init__(task)
        self.config = config = config_of(task, **changes)
        self.examples = [example(pair) for pair in task.pairs]
        with random_weights():
            self.roles = load_roles(config, trained="policy", reference=True)
        randomize_adapters(self.roles.model)
        recipe: Recipe[Any, Any] = make_recipe(config)
        if recipe.prepare:
            with mock.patch.dict(os.environ, {"ONECARD_CACHE": str(task.folder / "cache")}):
                self.examples = list(recipe.prepare(self.roles, self.examples, [])[0])
        self.job = Supervised(config, "dpo", recipe.objective(self.roles), self.examples, [])
        self.trainer = Trainer(config, self.job, self.roles, Run(task.folder, None, ()))
        self.roles.train()
        self.model, self.optimizer = self.roles.model, self.trainer.optimizer
        self.bar, self.first_micro_batch_sizes = no_bar(), self.micro_batch_sizes()

    def step(self, indices: Sequence[int]) -> dict[str, float]:
        return self.job.step(self.trainer, indices, self.bar)

    def micro_batch_sizes(self) -> tuple[Any, ...]:
        """The limits on micro-batches now. They are smaller than at first if memory ran out."""
        return self.trainer.micro_batch_size, self.job.budget.size

    def timed_step(self, timer: PhaseTimer) -> None:
        """A step, timed by phase."""
        with ExitStack() as stack:
            for phase, name in ((TRAIN, "compute_gradients"), (OPTIMIZER, "optimizer_step")):
                changed = timer.wrap(phase, getattr(self.trainer, name))
                stack.enter_context(mock.patch.object(self.trainer, name, changed))
            with timer.whole():
                self()


# Liger's norms and feed-forward layers patch one model; its rotations and losses would patch ours too.
LIGER = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


class TrlDPO(DPOStepper):
    """TRL's `DPOTrainer`, at the settings that take it the least memory."""

    def __init__(self, task: Task, *, liger: bool = False, answers_alone: bool = False) -> None:
        super().__init__(task)
        self.answers_alone = answers_alone
        import datasets
        from peft import LoraConfig
        from trl import DPOConfig as TheirConfig
        from trl import DPOTrainer

        quiet()
        datasets.disable_progress_bars()
        ours = DPOConfig(model=str(task.folder))
        base = random_model(
            str(task.folder),
            dtype=task.dtype,
            device_map={"": task.device},
            quantization_config=nf4_settings(task.dtype) if task.case.load_in_4bit else None,
        )
        settings = TheirConfig(
            output_dir=str(task.folder / "trl"),
            use_cpu=task.device.type == "cpu",
            bf16=task.dtype == torch.bfloat16,
            per_device_train_batch_size=task.case.micro_batch_size,
            gradient_accumulation_steps=task.case.batch_size // task.case.micro_batch_size,
            gradient_checkpointing=task.case.gradient_checkpointing,
            precompute_ref_log_probs=task.case.precompute_ref_log_probs,
            learning_rate=ours.learning_rate,
            beta=ours.beta,
            optim=task.case.optim,
            weight_decay=ours.weight_decay,
            max_grad_norm=ours.max_grad_norm,
            max_length=None,
            lr_scheduler_type="constant",
            max_steps=1 << 30,
            report_to=[],
            save_strategy="no",
        )
        rows = [{name: text(getattr(pair, name)) for name in ("prompt", "chosen", "rejected")} for pair in task.pairs]
        adapter = LoraConfig(
            r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.trainer: Any = DPOTrainer(
            model=base,
            args=settings,
            peft_config=adapter,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=load_word_tokenizer(task.folder),
        )
        check_same_tokens(self.trainer.train_dataset, task.pairs)
        randomize_adapters(self.trainer.model)
        if liger:
            use_liger(self.trainer.model)
        if task.case.gradient_checkpointing:  # what `train` does before its loop, which is not entered here
            self.trainer.model.gradient_checkpointing_enable()  # newer releases have another name for it
        self.trainer.create_optimizer()
        self.wrapped, self.prepared = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.model_wrapped, self.trainer.optimizer = self.wrapped, self.prepared
        self.model, self.optimizer = self.trainer.model, self.trainer.optimizer
        self.trainer.current_gradient_accumulation_steps = settings.gradient_accumulation_steps
        self.batches: list[Any] = []

    def ready(self) -> None:
        """Collate the next step."""
        rows = [self.trainer.train_dataset[index] for index in self.task.indices(self.done)]
        size = self.task.case.micro_batch_size
        self.batches = [self.trainer.data_collator(rows[at : at + size]) for at in range(0, len(rows), size)]

    def step(self, indices: Sequence[int]) -> dict[str, float]:
        # Without Triton, TRL's head also sees prompts and padding, unless its check says that Triton is there.
        patch = mock.patch("trl.trainer.utils._use_triton", return_value=True)
        trainer, losses = self.trainer, []
        with patch if self.answers_alone else nullcontext():
            for index, batch in enumerate(self.batches):
                trainer.accelerator.gradient_state._set_sync_gradients(index == len(self.batches) - 1)
                losses.append(trainer.training_step(self.wrapped, batch))
        norm = trainer.accelerator.clip_grad_norm_(self.wrapped.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self.wrapped.zero_grad()
        found = {name: sum(values[-len(losses) :]) / len(losses) for name, values in trainer._metrics["train"].items()}
        return {**found, "loss": float(sum(losses)), "grad_norm": float(norm)}


def use_liger(model: Any) -> None:
    """Give this one model Liger's layers, and undo the patch of transformers' module."""
    from transformers.integrations.liger import apply_liger_kernel

    module = vars(sys.modules[type(model.get_base_model()).__module__])
    before = dict(module)
    try:
        apply_liger_kernel(model, LIGER)
    finally:
        module.update(before)


def check_same_tokens(rows: Any, pairs: Sequence[Pair]) -> None:
    """TRL tokenizes text: its tokens must be those of our pairs."""
    for row, pair in zip(rows, pairs, strict=True):
        theirs = tuple(tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        assert theirs == (pair.prompt, pair.chosen, pair.rejected), "TRL's tokens are others than ours"


def example(pair: Pair) -> PreferencePair:
    """The same tokens as a record of the engine."""

    def side(answer: tuple[int, ...]) -> TokenSequence:
        return TokenSequence(pair.prompt + answer, (False,) * len(pair.prompt) + (True,) * len(answer))

    return PreferencePair(side(pair.chosen), side(pair.rejected))


def randomize_adapters(model: Any) -> None:
    """Set adapter values that do not depend on adapter names: N(0, 1 / columns) and N(0, NOISE)."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            std = NOISE if "lora_B" in name else parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).normal_(std=std, generator=generator)
            parameter.data.copy_(values)


def quiet() -> None:
    """Silence repeated warnings of the libraries."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "trl", "accelerate", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def stored_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of memory behind tensors, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def quantization_of(model: Any) -> list[torch.Tensor]:
    """The statistics of quantized weights."""
    states = [state for weight in model.parameters() if (state := getattr(weight, "quant_state", None)) is not None]
    states += [state.state2 for state in states if state.nested]
    return [tensor for state in states for tensor in (state.absmax, state.code)]


def held_bytes(model: Any, optimizer: Any, *, paged: bool = True) -> int:
    """Bytes of weights, quantization statistics, buffers, optimizer states and float32 copies of weights.

    Not `paged`: without states in memory that host and card share, which the card's allocator knows nothing of.
    """
    states = [value for state in optimizer.state.values() for value in state.values()]
    states += [updated for group in optimizer.param_groups for updated in group["params"]]
    kept = [value for value in states if paged or not getattr(value, "is_paged", False)]
    return stored_bytes([*model.parameters(), *model.buffers(), *quantization_of(model), *kept])
