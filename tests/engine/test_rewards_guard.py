"""Reward functions that do what they should not: one clear line, or no effect on the run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onecard.rewards.answers import Answers
from onecard.rewards.functions import RewardFunction, load_function
from onecard.rewards.validation import call_function
from onecard.training.signals import stop_requests
from onecard.utils.errors import OnecardError

COLUMNS = {"tags": (["a"], ["b", "c"])}


def called(call: Callable[..., Any], timeout: float = 0.0) -> Any:
    answers = Answers(("the cat", "the dog"), (" sat", " ran"), ((5, 6), (7,)), COLUMNS)
    return call_function(RewardFunction("mine.py:score", call), answers, timeout)


class OfItsOwn(BaseException):
    pass


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class NoLength(list):  # type: ignore[type-arg]
    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __iter__(self) -> Any:
        raise RuntimeError("no items")


class NoNumber:
    ndim = 0

    def item(self) -> float:
        raise RuntimeError("no number")


class NoWords:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def raises(error: BaseException) -> Callable[..., Any]:
    def score(**_: Any) -> Any:
        raise error

    return score


def returns(value: Any) -> Callable[..., Any]:
    return lambda **_: value


def leaves(**_: Any) -> Any:
    os._exit(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (raises(OfItsOwn("gone")), r"raised OfItsOwn: gone \(.*; prompt 'the cat'"),
        (raises(GeneratorExit()), "raised GeneratorExit"),
        (raises(SystemExit(3)), "raised SystemExit: 3"),
        (raises(Mute()), r"raised Mute \("),
        (leaves, r"raised SystemExit: os._exit\(0\)"),
        (returns(NoLength()), "raised RuntimeError: no items"),
        (returns([NoNumber(), 1.0]), "raised RuntimeError: no number"),
        (returns([NoWords(), 1.0]), r"returned a value without a repr \(NoWords\), which is not a number"),
        (returns([1e38, 1.0]), r"returned 1e\+38, which is beyond 1e\+18; prompt 'the cat'"),
        (returns([10**400, 1.0]), "which is not finite in 32 bits"),
    ],
)  # fmt: skip
def test_whatever_a_function_does_is_one_line(call, message):
    with pytest.raises(OnecardError, match=message) as error:
        called(call)
    assert "reward function mine.py:score" in str(error.value)
    assert str(error.value).isprintable()


def state(folder: Path) -> list[Any]:
    """All that a function could change."""
    return [
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
        os.getcwd(), sys.getrecursionlimit(), sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM), os._exit,
    ]  # fmt: skip


@pytest.mark.parametrize("end", [lambda: [1.0, 2.0], lambda: raises(ValueError("x"))()])
def test_what_a_function_changes_of_the_process_is_put_back(tmp_path, end):
    def score(**_: Any) -> Any:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.set_grad_enabled(not torch.is_grad_enabled())
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(torch.get_num_threads() + 1)
        os.chdir(tmp_path)
        sys.setrecursionlimit(sys.getrecursionlimit() + 7)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return end()

    before = state(tmp_path)
    try:
        called(score)
    except OnecardError as error:
        assert "ValueError" in str(error)  # noqa: PT017
    assert state(tmp_path) == before


def test_draws_of_a_function_depend_on_the_answers_alone():
    def score(**_: Any) -> Any:
        return [torch.rand(()).item() + random.random() + np.random.random(), 0.0]  # noqa: NPY002

    first = called(score)
    torch.rand(3)
    random.random()
    assert called(score) == first
    answers = Answers(("the cat", "the dog"), (" sat", " sat"), ((5, 6), (5, 6)), COLUMNS)
    assert call_function(RewardFunction("f", score), answers) != first


def test_functions_get_copies():
    def score(prompts: list[str], completion_ids: list[Any], tags: list[list[str]], **_: Any) -> Any:
        assert (prompts, completion_ids, tags) == (["the cat", "the dog"], [[5, 6], [7]], [["a"], ["b", "c"]])
        prompts.clear()
        completion_ids[0].clear()
        tags[1].sort(reverse=True)
        tags[0].append("x")
        return [0.0, 0.0]

    called(score)
    called(score)
    assert COLUMNS == {"tags": (["a"], ["b", "c"])}


def double(number: int) -> int:
    return 2 * number


def test_workers_end_when_their_pool_does():
    """`Pool` ends them with SIGTERM, which a run takes for a wish to stop."""

    def score(**_: Any) -> Any:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(double, [1, 2])

    began = time.perf_counter()
    with stop_requests() as stopping:
        assert called(score) == [2.0, 4.0]
        assert not stopping()
    assert time.perf_counter() - began < 30


def test_a_worker_that_is_ended_at_once_ends():
    """A signal sent right after the fork ends the child: it is not lost, and the run's handler does not get it."""
    with stop_requests() as stopping:
        for _ in range(20):
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert not stopping()


def test_a_function_that_takes_long_is_named(capsys):
    def score(**_: Any) -> Any:
        time.sleep(0.4)
        return [0.0, 0.0]

    assert called(score, timeout=0.1) == [0.0, 0.0]
    assert "reward function mine.py:score has been running for 0.1 s" in " ".join(capsys.readouterr().err.split())
    called(score, timeout=5.0)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\nos._exit(0)\n", r"raised SystemExit: os._exit\(0\)"),
        ("class Own(BaseException):\n    pass\nraise Own('x')\n", "raised Own: x"),
    ],
)
def test_what_a_file_does_when_it_is_imported_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(OnecardError, match=f"importing .*mine.py {message}"):
        load_function(f"{tmp_path / 'mine.py'}:score")


def test_a_function_that_ends_the_process_gives_exit_code_2(quick, onecard, tmp_path, tiny_model):
    (tmp_path / "mine.py").write_text("import os\ndef score(**_):\n    os._exit(0)\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat"}\n' * 8)
    done = onecard(
        "ppo", "--model", tiny_model, "--dataset", tmp_path / "rows.jsonl", "--reward_funcs",
        f"{tmp_path / 'mine.py'}:score", "--response_length", 4, "--batch_size", 8, "--output_dir", tmp_path / "run",
        "--test_size", 0,
    )  # fmt: skip
    assert done.code == 2, done.err
    assert "raised SystemExit: os._exit(0)" in done.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--seed", 2**64), ("--num_train_epochs", "1e308"), ("--kl_coef", "1e308"), ("--max_steps", 2**64),
        ("--lora_alpha", 10**400), ("--learning_rate", "inf"), ("--learning_rate", "nan"), ("--gamma", "1e400"),
    ],
)  # fmt: skip
def test_numbers_beyond_all_bounds_name_their_setting(onecard, tmp_path, flag, value):
    done = onecard("ppo", "--model", "m", "--dataset", "d", flag, value)
    assert done.code == 2
    assert flag in done.err
    assert len(done.err.splitlines()) == 1
    (tmp_path / "run.yaml").write_text(f"{flag[2:]}: {value}\n")
    done = onecard("ppo", "--config", tmp_path / "run.yaml")
    assert done.code == 2
    assert flag[2:] in done.err


@pytest.mark.parametrize(("name", "value"), [("max_steps", "1.7"), ("max_steps", "true"), ("learning_rate", "yes")])
def test_a_file_with_a_number_of_another_kind_names_its_setting(onecard, tmp_path, name, value):
    (tmp_path / "run.yaml").write_text(f"{name}: {value}\n")
    done = onecard("sft", "--config", tmp_path / "run.yaml")
    assert done.code == 2
    assert f"run.yaml: {name}: " in done.err
