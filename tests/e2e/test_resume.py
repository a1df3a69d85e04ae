"""A run that was stopped goes on as if it had not been: the same metrics and the same weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from onecard.training import trainer
from tests.grid import grid

pytestmark = pytest.mark.usefixtures("quick")

STEPS = 8


def arguments(model: Path, pairs: Path, folder: Path, *more: object, samples: bool = False) -> list[str]:
    """A small run; `samples`: the default ones at each evaluation."""
    settings: list[object] = ["--test_size", 4, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    settings += ["--max_steps", STEPS, "--save_steps", 2, "--eval_steps", 3, "--logging_steps", 3, "--max_length", 64]
    settings += ["--learning_rate", 1e-2, "--lr_scheduler_type", "cosine", "--warmup_steps", 2]
    settings += [] if samples else ["--eval_samples", 0]
    return [str(word) for word in ("--model", model, "--dataset", pairs, "--output_dir", folder, *settings, *more)]


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of the exported role, as bytes."""
    files = sorted(folder.glob("*/*.safetensors"))
    assert files
    return {
        f"{file.name}:{name}": tensor.flatten().view(-1).numpy().tobytes()
        for file in files
        for name, tensor in load_file(str(file)).items()
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what the clock and the machine put into them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the run in the middle of optimizer step `step`, after its gradients and before its update."""
    whole = trainer.Trainer.optimizer_step

    def interrupted(self):
        if self.step == step:
            raise KeyboardInterrupt
        whole(self)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", interrupted)


VARIANTS = {
    "dpo, LoRA": ("dpo",),
    "dpo, 8-bit AdamW": ("dpo", "--optim", "adamw_8bit", "--lora_r", "64"),
    "dpo, paged 8-bit AdamW, 4-bit base, checkpointing": (
        "dpo", "--optim", "paged_adamw_8bit", "--lora_r", "64", "--load_in_4bit", "--gradient_checkpointing",
    ),
    "dpo, all weights, padded": ("dpo", "--no_use_peft", "--no_padding_free"),
    "reward": ("reward",),
}  # fmt: skip


@pytest.mark.parametrize("variant", grid(VARIANTS, VARIANTS.keys() - {"dpo, 8-bit AdamW"}))
def test_interrupted_and_resumed_equals_uninterrupted(onecard, monkeypatch, tmp_path, tiny_model, pairs, variant):
    command, *more = VARIANTS[variant]

    def arguments_of(folder, *others):
        return arguments(tiny_model, pairs, tmp_path / folder, *more, *others, samples=command == "reward")

    whole = onecard(command, *arguments_of("whole"))
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        stopped = onecard(command, *arguments_of("stopped"))
        assert stopped.code == 130
        assert "--resume" in stopped.err
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir()
    resumed = onecard(command, *arguments_of("stopped", "--resume"))
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.err
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "whole")] == [0, 3, 3, 6, 6, 8, 8]


def test_a_torn_checkpoint_is_said_and_passed_over(onecard, tmp_path, tiny_model, pairs):
    assert onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run")).code == 0
    finished = weights(tmp_path / "run")
    torn = tmp_path / "run" / "checkpoint-8" / "policy" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    over = onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run", "--resume"))
    assert over.code == 2
    assert "checkpoint-8 is damaged (files are missing or changed), and the run has ended; add --overwrite" in over.err
    shutil.rmtree(tmp_path / "run" / "policy")
    result = onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run", "--resume"))
    assert result.code == 0, result.err
    assert "checkpoint-8 is damaged" in result.err
    assert "resuming from" in result.err
    assert "checkpoint-6" in result.err
    assert weights(tmp_path / "run") == finished


def test_resuming_a_finished_run_changes_nothing(onecard, tmp_path, tiny_model, pairs):
    assert onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run")).code == 0
    before = weights(tmp_path / "run"), metrics(tmp_path / "run")
    assert onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run", "--resume")).code == 0
    assert (weights(tmp_path / "run"), metrics(tmp_path / "run")) == before
