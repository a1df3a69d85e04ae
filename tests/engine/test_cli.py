"""Flags, files and defaults; and every mistake in them as one line with exit code 2."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import types

import pytest
import torch

from onecard import config
from onecard.algorithms import dpo
from onecard.commands import cli


@pytest.fixture
def received(monkeypatch):
    """The settings that a command hands to its algorithm, without the algorithm."""
    got = []
    module = types.ModuleType("onecard.recorder")
    monkeypatch.setattr(module, "run", got.append, raising=False)
    monkeypatch.setitem(sys.modules, "onecard.recorder", module)
    commands = {name: (cls, "onecard.recorder:run", text) for name, (cls, _, text) in cli.COMMANDS.items()}
    monkeypatch.setattr(cli, "COMMANDS", commands)
    return got


def test_defaults_are_those_of_the_dataclass(onecard, received):
    assert onecard("dpo").code == 0
    assert received == [config.DPOConfig()]


def test_flags_of_every_kind(onecard, received):
    result = onecard(
        "dpo", "--model", "m", "--learning-rate", "1e-3", "--beta=0.2", "--no_use_peft", "--load_in_4bit",
        "--loss_type", "sigmoid", "--loss_type", "ipo", "--loss_weights", "1", "--loss_weights", "0.5",
        "--optim", "paged_adamw_8bit", "--max_steps", "7",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert received == [
        config.DPOConfig(
            model="m",
            learning_rate=1e-3,
            beta=0.2,
            use_peft=False,
            load_in_4bit=True,
            loss_type=["sigmoid", "ipo"],
            loss_weights=[1.0, 0.5],
            optim="paged_adamw_8bit",
            max_steps=7,
        )
    ]


def test_command_line_over_file_over_default(onecard, received, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: from-file\nlearning_rate: 2.0e-5\nbeta: 0.3\nloss_type: ipo\nuse_peft: false\n")
    assert onecard("dpo", "--config", file, "--beta", "0.4").code == 0
    assert received == [
        config.DPOConfig(model="from-file", learning_rate=2e-5, beta=0.4, loss_type=["ipo"], use_peft=False)
    ]


def test_a_written_config_runs_again(onecard, received, tmp_path):
    """What a run folder keeps is enough to run again: dump every field, read every field."""
    import yaml

    settings = config.SFTConfig(model="m", lora_target_modules=["q_proj", "v_proj"], warmup_steps=0.1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings)))
    assert onecard("sft", "--config", tmp_path / "config.yaml").code == 0
    assert received == [settings]


BAD = {
    "unknown flag": (["sft", "--lerning_rate", "1"], "No such option '--lerning_rate'", "--learning_rate"),
    "unknown command": (["spt"], "No such command 'spt'", "sft"),
    "not a number": (["sft", "--learning_rate", "fast"], "--learning_rate", "'fast'"),
    "below the least": (["sft", "--save_steps", "-1"], "--save_steps", "-1 is not in the range x>=0"),
    "not a number at all": (["sft", "--learning_rate", "nan"], "--learning_rate", "nan"),
    "an integer of 67 bits": (["sft", "--seed", "99999999999999999999"], "--seed", "does not fit into 64 bits"),
    "unknown choice": (["sft", "--optim", "adam"], "'adam' is not one of", "adamw_torch"),
    "a stray word": (["sft", "word"], "unexpected extra argument", "word"),
    "missing value": (["sft", "--model"], "--model", "requires an argument"),
    "no such config": (["sft", "--config", "none.yaml"], "--config: cannot read none.yaml", "No such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_command_line_is_one_line(onecard, received, case):
    arguments, *expected = BAD[case]
    result = onecard(*arguments)
    assert result.code == 2
    assert not received
    assert result.err.count("\n") == 1
    assert all(text in result.err for text in expected), result.err


BAD_FILES = {
    "unknown key": ("learning_rat: 1\n", "unknown key 'learning_rat'", "Did you mean 'learning_rate'?"),
    "wrong type": ("learning_rate: fast\n", "learning_rate", "'fast'"),
    "a number for a switch": ("use_peft: 7\n", "use_peft", "7"),
    "a list for a number": ("seed: [1, 2]\n", "seed", "is not a valid value"),
    "a mapping for a number": ("learning_rate: {a: 1}\n", "learning_rate", "expected a plain value"),
    "a date for a number": ("max_length: 2024-01-01\n", "max_length", ""),
    "a date that is none": ("dataset: 2024-13-45\n", "is not YAML", ""),
    "nothing": ("learning_rate:\n", "learning_rate", "expected a plain value"),
    "a list of nothing": ("lora_target_modules:\n", "lora_target_modules", "expected a plain value"),
    "a list": ("- a\n- b\n", "holds a list", "key: value"),
    "not yaml": ("a: [1\n", "is not YAML", ""),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_config_file_is_one_line(onecard, received, tmp_path, case):
    text, *expected = BAD_FILES[case]
    (tmp_path / "c.yaml").write_text(text)
    result = onecard("sft", "--config", tmp_path / "c.yaml")
    assert result.code == 2
    assert not received
    assert result.err.count("\n") == 1
    assert all(part in result.err for part in expected), result.err


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_documents_every_field_and_ends_with_an_example(onecard, command):
    settings, _, example = cli.COMMANDS[command]
    result = onecard(command, "--help")
    assert result.code == 0
    words = " ".join(result.out.split())
    for item in dataclasses.fields(settings):
        assert f"--{item.name}" in words
    assert example in words


@pytest.mark.parametrize("target", [target for _, target, _ in cli.COMMANDS.values()])
def test_every_command_has_something_to_run(target):
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from onecard.commands import cli; cli.make_cli(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), "DefaultCPUAllocator: can't"])
def test_out_of_memory_is_one_line_that_says_what_helps(onecard, monkeypatch, error):
    error = RuntimeError(error) if isinstance(error, str) else error

    def run(config):
        raise error

    monkeypatch.setattr(dpo, "run", run)
    result = onecard("dpo", "--model", "x")
    assert result.code == 2
    assert result.err.startswith("onecard: error: out of memory while loading weights or in the optimizer step")
    assert "--load_in_4bit" in result.err
    assert result.err.count("\n") == 1


def test_another_runtime_error_is_not_taken_for_it(onecard, monkeypatch):
    def run(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr(dpo, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["dpo", "--model", "x"])
