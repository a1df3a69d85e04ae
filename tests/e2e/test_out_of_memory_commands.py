"""Whole commands on a model that runs out of memory on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onecard.models.roles import Roles
from onecard.rollout import CachedBatch
from onecard.training.trainer import Trainer
from tests.e2e.ppo_material import GOOD, WORDS, error_line, same_policy, without_clock, write_rows

pytestmark = pytest.mark.usefixtures("quick")

MESSAGE = "onecard: error: out of memory: "
Limits = Callable[[bool], float]  # whether a pass has gradients -> the most tokens that memory has room for


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    prompts = [f"the {WORDS[i % 6]} {'sat on ' * (i % 4)}{i}" for i in range(17)]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    pairs = [{"prompt": prompt, "chosen": " good answer", "rejected": " bad mat"} for prompt in prompts]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "good.py").write_text(GOOD)
    return tmp_path


@contextmanager
def room_for(limits: Limits, *, rows: float = 1e9, in_step: int | None = None) -> Iterator[list[int]]:
    """Passes of more tokens than `limits` says, and sampling of more rows, find no memory; in one step only, if given.

    Gives the numbers of tokens and rows that were too many.
    """
    hidden, logits, apply = Roles.hidden, CachedBatch.logits, Trainer.log_step
    failed: list[int] = []
    steps = [0]

    def short() -> bool:
        return in_step is None or steps[0] == in_step

    def small_hidden(self: Roles, batch, places) -> Tensor:
        found = hidden(self, batch, places)
        if short() and batch.num_tokens > limits(torch.is_grad_enabled()):
            failed.append(batch.num_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    def small_logits(self: CachedBatch) -> Tensor:
        if short() and len(self.row_prompts) > rows:
            failed.append(len(self.row_prompts))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits(self)

    def log_step(self, *words) -> None:
        apply(self, *words)
        steps[0] = self.step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Roles, "hidden", small_hidden)
        patch.setattr(CachedBatch, "logits", small_logits)
        patch.setattr(Trainer, "log_step", log_step)
        yield failed


def dpo(model: Path, material: Path, folder: str, *more: object) -> list[object]:
    return [
        "dpo", "--model", model, "--dataset", material / "pairs.jsonl", "--output_dir", material / folder,
        "--test_size", 4, "--per_device_train_batch_size", 6, "--max_steps", 4, "--learning_rate", 1e-2,
        "--save_steps", 1, "--eval_steps", 2, "--eval_samples", 0, *more,
    ]  # fmt: skip


def ppo(model: Path, material: Path, folder: str, *more: object) -> list[object]:
    """No `stop_token`: all answers have 8 tokens, and passes are as long in each run."""
    return [
        "ppo", "--model", model, "--dataset", material / "prompts.jsonl", "--output_dir", material / folder,
        "--reward_funcs", f"{material / 'good.py'}:score", "--reward_funcs", "fluency", "--test_size", 4,
        "--batch_size", 8, "--per_device_train_batch_size", 4, "--num_ppo_epochs", 2, "--response_length", 8,
        "--learning_rate", 1e-2, "--max_steps", 4, "--save_steps", 1, "--eval_steps", 2, *more,
    ]  # fmt: skip


COMMANDS = {"dpo": dpo, "ppo": ppo}


def weights(folder: Path) -> Tensor:
    parts = load_file(folder / "policy" / "adapter_model.safetensors")
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def close_rows(first: Path, second: Path) -> None:
    """Metrics are those of a run that was not short of memory, to rounding (which four steps of Adam have grown)."""
    for one, other in zip(without_clock(first), without_clock(second), strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("layout", [(), ("--no_padding_free",)], ids=["packed", "padded"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_that_is_short_of_memory_comes_to_the_same(onecard, tiny_model, material, name, layout):
    command = COMMANDS[name]
    result = onecard(*command(tiny_model, material, "whole", *layout))
    assert result.code == 0, result.err
    assert "out of memory" not in result.err
    with room_for(lambda learning: 60) as failed:
        result = onecard(*command(tiny_model, material, "short", *layout))
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if "out of memory" in line]
    assert any("micro-batches of at most" in line and "the step is done again" in line for line in lines)
    assert any("passes without gradients of at most" in line for line in lines)
    assert len(failed) == len(lines)
    whole, short = weights(material / "whole"), weights(material / "short")
    assert float((whole - short).norm() / whole.norm()) < 1e-3
    close_rows(material / "whole", material / "short")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_resumed_run_keeps_the_smaller_cuts(onecard, tiny_model, material, monkeypatch, name):
    """Memory is short in the second step alone. Killed after the third and gone on with: the same, bit for bit."""
    command = COMMANDS[name]
    short = {"rows": 5, "in_step": 1} if name == "ppo" else {"in_step": 1}
    with room_for(lambda learning: 60 if learning else 90, **short) as failed:
        assert onecard(*command(tiny_model, material, "whole")).code == 0
    assert failed
    if name == "ppo":
        assert {8} <= set(failed)
    log_step = Trainer.log_step

    def killed(self, *words) -> None:
        log_step(self, *words)
        if self.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log_step", killed)
        with room_for(lambda learning: 60 if learning else 90, **short):
            assert onecard(*command(tiny_model, material, "halved")).code == 130
    state = json.loads((material / "halved" / "checkpoint-3" / "state.json").read_text())
    assert 0 < state["micro_batch_tokens"] <= 60
    if name == "ppo":
        assert all(state["job"]["tokens"].values())
    result = onecard(*command(tiny_model, material, "halved", "--resume"))
    assert result.code == 0, result.err
    assert "out of memory" not in result.err
    assert same_policy(material / "whole", material / "halved")
    assert without_clock(material / "whole") == without_clock(material / "halved")


@pytest.mark.parametrize("name", COMMANDS)
def test_one_example_that_is_too_much_is_one_line(onecard, tiny_model, material, name):
    with room_for(lambda learning: 5 if learning else 10**6):
        result = onecard(*COMMANDS[name](tiny_model, material, "run"))
    line = error_line(result)
    assert line.startswith(MESSAGE)
    assert "is too much for a micro-batch of its own" in line
    assert "onecard fit" in line
    assert not list((material / "run").glob("**/*checkpoint*"))
    assert not (material / "run" / "policy").exists()
    if name == "ppo":  # the startup check has met it: nothing was written at all
        assert not (material / "run").exists()


def test_a_startup_check_recovers_too(onecard, tiny_model, material):
    """Every kind of pass of it, and the answers themselves; the run behind it goes on with the smaller cuts."""
    with room_for(lambda learning: 40, rows=3, in_step=0) as failed:
        result = onecard(*ppo(tiny_model, material, "run", "--max_steps", 1))
    assert result.code == 0, result.err
    assert "the startup check continues in micro-batches of at most" in result.err
    assert "the KV cache of a batch of prompts takes at most" in result.err
    assert failed


def test_a_reference_computed_beforehand_recovers(onecard, tiny_model, material):
    precompute = "--precompute_ref_log_probs"
    assert onecard(*dpo(tiny_model, material, "whole", precompute)).code == 0
    for path in (material / "cache").rglob("*.safetensors"):
        path.unlink()
    with room_for(lambda learning: 10**6 if learning else 60) as failed:
        result = onecard(*dpo(tiny_model, material, "short", precompute))
    assert result.code == 0, result.err
    assert failed
    close_rows(material / "whole", material / "short")


def test_a_loss_that_sorts_its_batch_says_that_it_cannot_be_cut(onecard, tiny_model, material):
    with room_for(lambda learning: 70 if learning else 10**6):
        result = onecard(*dpo(tiny_model, material, "run", "--loss_type", "aot"))
    assert error_line(result).startswith(f"{MESSAGE}loss_type aot sorts the 6 examples of a step as one batch")


def test_the_optimizer_s_own_error_is_one_line(onecard, tiny_model, material, monkeypatch):
    def step(self, *words):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    result = onecard(*dpo(tiny_model, material, "run"))
    assert error_line(result).startswith("onecard: error: out of memory while loading weights or in the optimizer step")


@pytest.mark.parametrize("name", COMMANDS)
def test_token_budgets_come_to_the_same(onecard, tiny_model, material, name):
    """`micro_batch_tokens` cuts every pass of the run, with gradients and without."""
    seen: dict[bool, int] = {True: 0, False: 0}
    hidden = Roles.hidden

    def counted(self, batch, places):
        if len(batch.lengths) > (2 if name == "dpo" else 1):
            seen[torch.is_grad_enabled()] = max(seen[torch.is_grad_enabled()], batch.num_tokens)
        return hidden(self, batch, places)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Roles, "hidden", counted)
        assert onecard(*COMMANDS[name](tiny_model, material, "whole")).code == 0
        assert min(seen.values()) > 64
        seen.update({True: 0, False: 0})
        result = onecard(*COMMANDS[name](tiny_model, material, "cut", "--micro_batch_tokens", 64))
    assert result.code == 0, result.err
    assert min(seen.values()) > 32
    assert max(seen.values()) <= 64
    close_rows(material / "whole", material / "cut")
