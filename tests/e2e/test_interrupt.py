"""Ctrl-C in a run: the step is finished, a checkpoint is written, and the command that is shown resumes the run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from onecard.commands import cli
from onecard.training import signals
from onecard.training.signals import next_command
from onecard.training.trainer import Trainer
from tests.e2e.ppo_material import flags, settings
from tests.e2e.test_resume import arguments, metrics, weights

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Signal handlers of a terminal. A process in the background of a script ignores Ctrl-C from the start."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send this process signals in the middle of a step's first update."""
    whole, left = Trainer.optimizer_step, list(numbers)

    def signalled(self):
        while left and self.step == step:
            os.kill(os.getpid(), left.pop())
        whole(self)

    monkeypatch.setattr(Trainer, "optimizer_step", signalled)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_stops_after_its_step(onecard, monkeypatch, tmp_path, tiny_model, pairs, number):
    handlers = [signal.getsignal(each) for each in signals.SIGNALS]
    assert onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "whole")).code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 4, number)
        stopped = onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run"))
    assert stopped.code == 130
    assert f"the run up to this step is saved in {tmp_path / 'run' / 'checkpoint-5'}" in stopped.err.splitlines()[-1]
    assert not (tmp_path / "run" / "policy").exists()
    assert [signal.getsignal(each) for each in signals.SIGNALS] == handlers
    assert onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run", "--resume")).code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_ppo_stops_after_its_iteration(onecard, monkeypatch, tmp_path, tiny_model, material):
    run = settings(tiny_model, material, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, 0, signal.SIGINT)
        assert onecard("ppo", *flags(run)).code == 130
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert onecard("ppo", *flags({**run, "--resume": True})).code == 0
    assert weights(tmp_path / "run") == weights(material / "old")


def test_a_second_signal_stops_at_once(onecard, monkeypatch, tmp_path, tiny_model, pairs):
    signal_at(monkeypatch, 4, signal.SIGINT, signal.SIGINT)
    stopped = onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run"))
    assert stopped.code == 130
    assert "interrupted. To continue a training run from its last checkpoint" in stopped.err
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_an_ignored_signal_stays_ignored(onecard, monkeypatch, tmp_path, tiny_model, pairs):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_at(monkeypatch, 4, signal.SIGINT)
    assert onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run")).code == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_signal_in_the_last_step_lets_the_run_end(onecard, monkeypatch, tmp_path, tiny_model, pairs):
    signal_at(monkeypatch, 7, signal.SIGINT)
    assert onecard("dpo", *arguments(tiny_model, pairs, tmp_path / "run")).code == 0
    assert (tmp_path / "run" / "policy").exists()


def test_the_shown_command_resumes_the_run(tmp_path, tiny_model, pairs):
    """A real process and a real signal; the command in its last line parses, and resumes the run."""
    words = [sys.executable, "-m", "onecard", "dpo", *arguments(tiny_model, pairs, tmp_path / "run"), "--overwrite"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words[words.index("--max_steps") + 1] = "200"
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoint-2").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130, said
    command = shlex.split(said.splitlines()[-1].partition("Resume with: ")[2])
    assert command == ["python", "-m", "onecard", *words[3:-1], "--resume"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command[3:], "--help"])  # every word of it is a flag of the command
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["/venv/bin/onecard", "ppo", "--seed", "1"], "onecard ppo --seed 1 --resume"),
        (["/venv/bin/onecard", "dpo", "--resume", "--model", "a b"], "onecard dpo --model 'a b' --resume"),
        (["/site/onecard/__main__.py", "sft", "--overwrite"], "python -m onecard sft --resume"),
        (["/venv/bin/onecard", "demo", "--fresh"], "onecard demo"),
        (["/venv/bin/onecard", "dpo", "--output_dir", "demo"], "onecard dpo --output_dir demo --resume"),
    ],
)
def test_next_command(given, shown):
    assert next_command(given) == shown
