"""TRL's side of a DPO step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from benchmarks.train_step.dpo import Side, Task, quiet, shake
from benchmarks.train_step.material import Pair, drawn_weights, text, whole_words
from onecard.config import DPOConfig

# Its norms and feed-forward parts go into one model; its rotations and losses would go into ours too.
LIGER = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


class Theirs(Side):
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
        with drawn_weights():
            from transformers import AutoModelForCausalLM

            base = AutoModelForCausalLM.from_pretrained(
                str(task.folder),
                dtype=task.dtype,
                device_map={"": task.device},
                quantization_config=nf4(task.dtype) if task.load_in_4bit else None,
            )
        settings = TheirConfig(
            output_dir=str(task.folder / "trl"),
            use_cpu=task.device.type == "cpu",
            bf16=task.dtype == torch.bfloat16,
            per_device_train_batch_size=task.per_pass,
            gradient_accumulation_steps=task.per_step // task.per_pass,
            gradient_checkpointing=task.gradient_checkpointing,
            precompute_ref_log_probs=task.precompute_ref_log_probs,
            learning_rate=ours.learning_rate,
            beta=ours.beta,
            optim=task.optim,
            weight_decay=ours.weight_decay,
            max_grad_norm=ours.max_grad_norm,
            max_length=None,
            lr_scheduler_type="constant",
            max_steps=1 << 30,
            report_to=[],
            save_strategy="no",
        )
        rows = [
            {"prompt": text(pair.prompt), "chosen": text(pair.chosen), "rejected": text(pair.rejected)}
            for pair in task.pairs
        ]
        adapter = LoraConfig(
            r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.trainer: Any = DPOTrainer(
            model=base,
            args=settings,
            peft_config=adapter,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=whole_words(task.folder),
        )
        check_same_tokens(self.trainer.train_dataset, task.pairs)
        shake(self.trainer.model)
        if liger:
            use_liger(self.trainer.model)
        if task.gradient_checkpointing:  # what `train` does before its loop, which is not entered here
            self.trainer.model.gradient_checkpointing_enable()  # newer releases have another name for it
        self.trainer.create_optimizer()
        self.wrapped, self.prepared = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.model_wrapped, self.trainer.optimizer = self.wrapped, self.prepared
        self.trainer.current_gradient_accumulation_steps = settings.gradient_accumulation_steps
        self.batches: list[Any] = []

    def ready(self) -> None:
        """Collate the next step."""
        rows = [self.trainer.train_dataset[place] for place in self.task.places(self.done)]
        size = self.task.per_pass
        self.batches = [self.trainer.data_collator(rows[at : at + size]) for at in range(0, len(rows), size)]

    def step(self, places: Sequence[int]) -> dict[str, float]:
        with mock.patch("trl.trainer.utils._use_triton", on_any_device) if self.answers_alone else nullcontext():
            return self.whole_step()

    def whole_step(self) -> dict[str, float]:
        trainer = self.trainer
        losses = []
        for place, batch in enumerate(self.batches):
            trainer.accelerator.gradient_state._set_sync_gradients(place == len(self.batches) - 1)
            losses.append(trainer.training_step(self.wrapped, batch))
        norm = trainer.accelerator.clip_grad_norm_(self.wrapped.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self.wrapped.zero_grad()
        found = {name: sum(values[-len(losses) :]) / len(losses) for name, values in trainer._metrics["train"].items()}
        return {**found, "loss": float(sum(losses)), "grad_norm": float(norm)}

    def model(self) -> Any:
        return self.trainer.model

    def optimizer(self) -> Any:
        return self.trainer.optimizer


def use_liger(model: Any) -> None:
    """Give this one model Liger's layers. It also puts them where models to come would find them: that is undone."""
    from transformers.integrations.liger import apply_liger_kernel

    module = vars(sys.modules[type(model.get_base_model()).__module__])
    before = dict(module)
    try:
        apply_liger_kernel(model, LIGER)
    finally:
        module.update(before)


def on_any_device(_: torch.device) -> bool:
    """In TRL's place: whether the head sees the answers' rows alone. Without Triton it sees prompts and padding too."""
    return True


def nf4(dtype: torch.dtype) -> Any:
    """The 4-bit settings that `load_in_4bit` means in our engine."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_same_tokens(rows: Any, pairs: Sequence[Pair]) -> None:
    """TRL tokenizes text; it must come to the very tokens that ours are made of."""
    for row, pair in zip(rows, pairs, strict=True):
        theirs = tuple(tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        assert theirs == (pair.prompt, pair.chosen, pair.rejected), "TRL's tokens are others than ours"
