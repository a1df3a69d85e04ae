"""The loop: one normaliser for a step, every example once an epoch, schedules, optimizers, failures."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from onecard.algorithms import reward
from onecard.algorithms.supervised import make_schedule
from onecard.config import TrainConfig
from onecard.training.metrics import MetricsWindow, sum_metrics
from onecard.training.optim import make_optimizer, make_scheduler
from onecard.training.trainer import Trainer
from onecard.utils.errors import OnecardError
from onecard_kernels import Loss
from tests.grid import grid

pytestmark = pytest.mark.usefixtures("quick")


def test_bradley_terry_by_hand():
    """Differences 2 and -1, margins 1 and 0: (log(1 + e^-1) + log(1 + e)) / 2 = 0.81326; centering: 0.1 * 5 / 2."""
    chosen, rejected, margins = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    loss = reward.bradley_terry_loss(chosen, rejected, margins, center_rewards_coefficient=0.1, normalizer=2)
    assert loss.loss.item() == pytest.approx(0.8132617 + 0.25, rel=1e-6)
    assert {name: value.item() for name, value in loss.metrics.items()} == {
        "accuracy": 0.5,
        "margin": 0.5,
        "mean_reward": 0.75,
    }


def test_the_plan_sees_every_example_once_an_epoch():
    config = TrainConfig(per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=2)
    plan = make_schedule(config, 20)
    assert (plan.steps_per_epoch, plan.total_steps) == (4, 8)
    steps = list(plan.batches(0))
    for epoch in (steps[:4], steps[4:]):
        assert sorted(index for _, indices in epoch for index in indices) == list(range(20))
    assert steps[:4] != steps[4:]
    assert steps[-1][0] == 2.0
    assert list(plan.batches(3)) == steps[3:]
    assert list(plan.batches(4)) == steps[4:]
    assert make_schedule(TrainConfig(max_steps=5), 20).total_steps == 5
    with pytest.raises(OnecardError, match="num_train_epochs"):
        make_schedule(TrainConfig(num_train_epochs=0), 20)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_take_their_settings_and_descend(optim):
    weight = torch.nn.Parameter(torch.ones(8192))
    config = TrainConfig(optim=optim, learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8, adam_epsilon=1e-6)
    optimizer = make_optimizer(config, [weight])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.01, 0.1, (0.8, 0.999), 1e-6)
    weight.grad = torch.full_like(weight, 3.0)
    optimizer.step()
    # Adam's first step is the learning rate against the sign of the gradient, after the decay of lr * weight_decay
    torch.testing.assert_close(weight.data, torch.full_like(weight, 1 - 0.01 * 0.1 - 0.01), atol=1e-5, rtol=0)
    if optim != "adamw_torch":
        state = optimizer.state[weight]
        assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}


def test_a_beta_out_of_range_is_named():
    with pytest.raises(OnecardError, match=r"adam_beta2: 1\.0, expected"):
        TrainConfig(adam_beta2=1.0).validate()


def test_schedule_by_hand():
    """Two steps of warm-up, then linear to 0 over the eight that are left."""
    config = TrainConfig(learning_rate=1.0, warmup_steps=0.2)
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(1))])
    scheduler, rates = make_scheduler(config, optimizer, 10), []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_metrics_of_micro_batches_add_up_and_of_steps_average():
    losses = [Loss(torch.tensor(0.25), {"a": torch.tensor(1.0)}), Loss(torch.tensor(0.5), {"a": torch.tensor(2.0)})]
    assert sum_metrics(losses) == {"loss": 0.75, "a": 3.0}
    window = MetricsWindow()
    window.add({"loss": 1.0})
    again = MetricsWindow(**window.state())
    again.add({"loss": 2.0})
    again.add({"time": 3.0})  # of a step that had no loss
    assert again.take() == {"loss": 1.5, "time": 3.0}
    assert again.state() == {"sums": {}, "steps": {}}


def test_a_loss_that_is_no_number_stops_the_run_in_one_line(onecard, tmp_path, tiny_model, pairs):
    result = onecard(
        "dpo", "--model", tiny_model, "--dataset", pairs, "--output_dir", tmp_path / "run", "--learning_rate", "1e30",
        "--max_grad_norm", 0, "--max_steps", 5,
    )  # fmt: skip
    assert result.code == 2
    assert "after step" in result.err.splitlines()[-1]
    assert "learning_rate" in result.err.splitlines()[-1]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files may not grow past a limit, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [2_000, 200_000], ids=["weights", "optimizer"])
def test_a_disk_that_is_full_is_one_line(onecard, tmp_path, tiny_model, pairs, limit):
    """safetensors meets the small limit, torch.save the large one."""
    with full_disk(limit):
        result = onecard(
            "dpo", "--model", tiny_model, "--dataset", pairs, "--output_dir", tmp_path / "run", "--max_steps", 1,
            "--eval_samples", 0,
        )  # fmt: skip
    assert result.code == 2
    assert "checkpoint-1: cannot be written" in result.err.splitlines()[-1]
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.mark.parametrize("limit", grid([2_000, 200_000], [200_000]), ids=["weights", "optimizer"])
def test_a_full_disk_loses_nothing_that_was_there(onecard, monkeypatch, tmp_path, tiny_model, pairs, limit):
    """The disk fills up after the first checkpoint; with room again, the run goes on from it to the same weights."""

    def command(folder, *more):
        run = ("--model", tiny_model, "--dataset", pairs, "--output_dir", tmp_path / folder, "--eval_samples", 0)
        return onecard("dpo", *run, "--max_steps", 3, "--save_steps", 1, "--save_total_limit", 1, *more)

    whole, left = Trainer.save, ExitStack()

    def save(self):
        if self.step == 2:
            left.enter_context(full_disk(limit))
        return whole(self)

    assert command("whole").code == 0
    with left, monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save)
        result = command("run")
    assert result.code == 2
    assert "checkpoint-2: cannot be written" in result.err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-1"]
    assert command("run", "--resume").code == 0
    adapters = [(tmp_path / name / "policy" / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert adapters[0] == adapters[1]


def test_an_update_that_breaks_the_weights_is_not_saved(onecard, monkeypatch, tmp_path, tiny_model, pairs):
    """The loss before the last update was fine; the weights after it are not."""
    step = torch.optim.AdamW.step

    def poison(self, *arguments, **keywords):
        step(self, *arguments, **keywords)
        self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", poison)
    result = onecard(
        "dpo", "--model", tiny_model, "--dataset", pairs, "--output_dir", tmp_path / "run", "--max_steps", 1,
        "--test_size", 0,
    )  # fmt: skip
    assert result.code == 2
    assert "weights are NaN or infinite after step 1" in result.err.splitlines()[-1]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "policy").exists()
